"""A copy of a run's checkpoint without the state of its optimizer and scheduler.

python -m tools.strip_checkpoint runs/vanilla/epoch_82.pth models/ResNet82.pth
"""

from utils.checkpoint import RUN_STATE, load_checkpoint, save_checkpoint
from utils.cli import Parser, run


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("source", help="checkpoint of a run")
    p.add_argument("destination", help="file to write")
    return p


def main() -> None:
    args = parser().parse_args()
    checkpoint = load_checkpoint(args.source)
    save_checkpoint(args.destination, {key: value for key, value in checkpoint.items() if key not in RUN_STATE})


if __name__ == "__main__":
    run(main)
