"""Flags that several commands have, each with one meaning and one help text. Imports no torch."""

from utils.cli import Default, Parser, count, index


def add_device(p: Parser) -> None:
    p.add_argument("--cu_num", type=index, default=0, help="GPU number")
    p.add_argument("--device", default=None, help="cpu, cuda:1, ... (default: the GPU --cu_num, or the CPU)")


def add_arch(p: Parser) -> None:
    of_file = "(default: the one that the file names, ResNet32 if it names none)"
    p.add_argument("--arch", default=None, help=f"architecture; an error if the file names another {of_file}")


def add_data_dir(p: Parser, default: str | None = None) -> None:
    """`default` None: the folder that the checkpoint was trained with, else data, as in utils/opening.py."""
    where = "folder that holds <dataset>.npz, torchvision's archive, or train/ and val/ with a folder for each class"
    of_file = " (default: the folder that the file was trained with; else data, except for an imagefolder)"
    p.add_argument("--data_dir", default=default, metavar="DIR", help=where + ("" if default else of_file))


def add_image_size(p: Parser, default: str = "as in training, 224 if the file does not say") -> None:
    """`default`: what happens without the flag."""
    help_text = f"pixels per side that the images of an imagefolder are cut to (default: {default})"
    p.add_argument("--image_size", type=count, default=None, metavar="N", help=help_text)


def add_workers(p: Parser) -> None:
    help_text = "processes that read images of an imagefolder, for each process of torchrun; never more than the cores"
    p.add_argument("--workers", type=index, default=4, help=help_text)


def add_calib_images(p: Parser, default: int, purpose: str) -> None:
    help_text = f"unaugmented training images for {purpose}; all if there are fewer and N is not given"
    p.add_argument("--calib_images", type=count, default=Default(default), metavar="N", help=help_text)


def add_granularity(p: Parser, default: str | None = None) -> None:
    """`default` None: as the checkpoint was trained."""
    help_text = "one grid step for each weight tensor, or for each of its output channels"
    of_file = " (default: as in training, tensor if the file does not say)"
    choices = ["tensor", "channel"]
    p.add_argument("--granularity", choices=choices, default=default, help=help_text + ("" if default else of_file))


def add_first_last_quant(p: Parser) -> None:
    help_text = (
        "1: quantize and prune the first and the last layer too, at 8 bits if the others have fewer than 4; "
        "0: leave them in float and unpruned"
    )
    p.add_argument("--first_last_quant", type=int, choices=[0, 1], default=1, help=help_text)


def add_act_at(p: Parser) -> None:
    help_text = (
        "where activations are quantized: at every nn.ReLU, as published, or at the input of every convolution and "
        "linear layer, for networks with any activations; there the first and the last layer's input has 8 bits"
    )
    p.add_argument("--act_at", choices=["relu", "inputs"], default="relu", help=help_text)
