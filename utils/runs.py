"""Run folders: args.json, metrics.csv (a row per epoch), TensorBoard events and checkpoints of one training run."""

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

from utils.cli import UserError

ROOT = Path("runs")


def git_commit() -> str:
    """Commit of the code, with "+changes" if the working tree differs from it; "unknown" outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class RunFolder:
    """One folder under runs/. `create` never reuses a folder, `reopen` goes on in one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.csv"
        self.last_checkpoint = path / "last.pth"
        self._writer = None

    @classmethod
    def create(cls, exp_name: str, args: dict[str, Any]) -> "RunFolder":
        """A new folder runs/<exp_name>, or <exp_name>-2, -3 ... if that exists. Raises UserError if it cannot be made."""
        attempt = 1
        while True:
            path = ROOT / (exp_name if attempt == 1 else f"{exp_name}-{attempt}")
            try:
                path.mkdir(parents=True)
                break
            except FileExistsError:
                attempt += 1
            except OSError as error:
                raise UserError(f"run folder {path} cannot be made ({error.strerror}): choose another --exp_name") from None
        folder = cls(path)
        folder._write_settings(args)
        return folder

    @classmethod
    def reopen(cls, exp_name: str) -> "RunFolder":
        """The existing folder runs/<exp_name>. Raises UserError if there is no checkpoint in it to resume from."""
        folder = cls(ROOT / exp_name)
        if not folder.last_checkpoint.is_file():
            raise UserError(f"nothing to resume: {folder.last_checkpoint} is not there; start without --resume")
        return folder

    def settings(self) -> dict[str, Any]:
        """What args.json holds: args, command, commit, versions, and where the run was resumed."""
        try:
            return json.loads((self.path / "args.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / 'args.json'} cannot be read ({error})") from None

    def note_resume(self, after_epoch: int, **facts: Any) -> None:
        """Adds a resume, with the commit it runs at, to args.json."""
        settings = self.settings()
        settings.setdefault("resumed", []).append({"after_epoch": after_epoch, "commit": git_commit(), **facts})
        self._write_settings(settings)

    def _write_settings(self, settings: dict[str, Any]) -> None:
        temporary = self.path / "args.json.tmp"
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
        temporary.replace(self.path / "args.json")

    def start_logging(self, after_epoch: int) -> None:
        """Opens the logs, dropping what was written past `after_epoch`, the epoch of the checkpoint gone on from."""
        from torch.utils.tensorboard import SummaryWriter

        if self.metrics_path.exists():
            with open(self.metrics_path, newline="") as file:
                header, *rows = csv.reader(file)
            kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= after_epoch]
            temporary = self.metrics_path.with_suffix(".tmp")
            with open(temporary, "w", newline="") as file:
                csv.writer(file).writerows([header, *kept])
            temporary.replace(self.metrics_path)
        self._writer = SummaryWriter(self.path, purge_step=after_epoch + 1)

    def log(self, row: dict[str, float]) -> None:
        """Appends an epoch's row, whose first key is "epoch", to metrics.csv and TensorBoard."""
        new = not self.metrics_path.exists()
        with open(self.metrics_path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        for key, value in row.items():
            if key != "epoch":
                self._writer.add_scalar(key, value, row["epoch"])
        self._writer.flush()
