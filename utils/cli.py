"""Command-line helpers: one-line errors with exit code 2, and argument types. Imports no torch, so --help is quick."""

import argparse
import difflib
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any, NoReturn

from utils.signals import Stopped, stop_behind, stoppable

RANK = os.environ.get("RANK", "0")  # among the processes of torchrun
SPEAKER = "" if RANK == "0" else f"process {RANK}: "
CHECKPOINT_FLAGS = ("--model_path", "--load_pretrained")
ESCAPE_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # of terminals, such as bold


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, the value, what to do."""


class Default(int):
    """The default of a whole-number flag, which code can tell from a value that the user gave."""


def first_line(error: BaseException) -> str:
    """The first line of the message of `error`, without a terminal's escape codes; its type if it has no message."""
    lines = ESCAPE_CODES.sub("", str(error)).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def lost_reader(error: BaseException) -> str:
    """The message for torch's error about a DataLoader worker that has died; empty for any other error."""
    if not first_line(error).startswith(("DataLoader worker", "Pin memory thread")):
        return ""
    how = "has ended unexpectedly"
    cause: BaseException | None = error
    while cause:  # often only an earlier error names the signal
        if killed := re.search(r"killed by signal: ([\w ]+)", str(cause)):
            how = f"was killed (signal: {killed[1].strip()})"
        cause = cause.__cause__ or cause.__context__
    advice = "try fewer --workers or a smaller --batch_size"
    return f"a process that reads images {how}, as happens when memory is short: {advice}"


class Parser(argparse.ArgumentParser):
    """ArgumentParser that shows defaults in --help, keeps the description's lines, and reports errors in one line."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
            lasts = [os.path.join(word, "last.pth") for word in unknown]
            files = [last if os.path.isfile(last) else word for word, last in zip(unknown, lasts)]
            file = next((file for file in files if file.endswith((".pth", ".pt"))), None)
            near += [f"{flag} {file}" for flag in CHECKPOINT_FLAGS if file and flag in known]
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f" (did you mean {near[0]}?)" if near else ""))
        return parsed

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.splitlines())  # a flag's value may have line ends
        self.exit(2, f"{self.prog}: error: {line}\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Adds the default, except for flags whose default is None: their help says what happens then."""
        return action.help if action.default is None else super()._get_help_string(action)


def run(main: Callable[[], None]) -> None:
    """Calls a script's main; a UserError or an OSError becomes one line on stderr and exit code 2.

    Ctrl-C ends it with exit code 130 and SIGTERM with 143; the first process prints one line. A warning is one line.
    """
    try:
        with stoppable(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                main()
            except (RuntimeError, ConnectionError, EOFError) as error:
                reason = _explained(error)
                if reason is None:
                    raise
                raise UserError(reason) from None
    except (UserError, OSError) as error:
        if RANK != "0":
            time.sleep(3)  # torchrun ends the others when one fails: the first one reports what is wrong in all
        line = " ".join(str(error).splitlines()) or first_line(error)  # a path may have line ends
        print(f"{SPEAKER}error: {line}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt) as stop:
        if RANK == "0":
            print(stop if isinstance(stop, Stopped) else "interrupted", file=sys.stderr)
        sys.exit(stop.exit_code if isinstance(stop, Stopped) else 130)


def warn(text: str, speaker: str = "") -> None:
    """Prints a warning on stderr, after the name of its `speaker`."""
    print(f"{speaker}warning: {text}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Prints a library's warning like the scripts' own: in one line, without its place in the code."""
    warn(" ".join(str(message).split()), SPEAKER)


def _explained(error: Exception) -> str | None:
    """One line on what the user can do about an error that torch raises late; None for any other error.

    Raises Stopped if the error follows from a SIGINT or SIGTERM that has been noted.
    """
    reason = first_line(error)
    of_reader = lost_reader(error)
    of_fellow = type(error).__name__.startswith("Dist") or "gloo" in reason  # what torch.distributed raises
    stop_behind(wait=bool(of_reader) or (of_fellow and RANK != "0"))
    if of_reader:
        return of_reader
    if of_fellow:
        advice = "see its message; --resume continues a run that has saved an epoch"
        return f"another process of the run has ended ({reason}); {advice}"
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in reason:  # of a GPU, of the CPU
        return f"out of memory ({reason}); try a smaller batch, a smaller network or fewer images"
    if "does not have a deterministic implementation" in reason:
        return f"{reason.partition(',')[0]}: leave out --deterministic"
    return None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def positive(text: str) -> float:
    """Argument type: a finite number > 0."""
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return value


def as_typed(value: float | str) -> str:
    """A value of a flag that takes a number or a word, as one types it."""
    return value if isinstance(value, str) else f"{value:g}"


def positive_or(word: str) -> Callable[[str], float | str]:
    """Argument type: a finite number > 0, or `word`."""

    def convert(text: str) -> float | str:
        try:
            return text if text == word else positive(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or {word}") from None

    convert.__doc__ = f"Argument type: a finite number > 0, or {word}."
    return convert


def _up_to(text: str, most: int) -> float:
    value = positive(text)
    if value > most:
        raise argparse.ArgumentTypeError(f"{text} must be {most} or less")
    return value


def share(text: str) -> float:
    """Argument type: a number > 0 and <= 1."""
    return _up_to(text, 1)


def percent(text: str) -> float:
    """Argument type: a number > 0 and <= 100."""
    return _up_to(text, 100)


def sparsity(text: str) -> float:
    """Argument type: a share of zero weights, 0 or more and less than 1."""
    value = non_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} must be less than 1 (0.9 prunes 90 percent)")
    return value


def non_negative(text: str) -> float:
    """Argument type: a finite number >= 0."""
    value = _number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or greater")
    return value


def _whole(text: str, least: int, most: float = math.inf) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(
            f"{text} must be {least} or greater" if most == math.inf else f"{text} must be from {least} to {most}"
        )
    return value


def count(text: str) -> int:
    """Argument type: a whole number >= 1."""
    return _whole(text, 1)


def epochs(text: str) -> list[int]:
    """Argument type: an epoch, "82", or a range of them, "103-150"."""
    first, dash, last = text.partition("-")
    if not dash:
        return [count(first)]
    start, end = (_whole(word, 1, 10**6) for word in (first, last))
    if start > end:
        raise argparse.ArgumentTypeError(f"{text} ends before it begins")
    return list(range(start, end + 1))


class EpochSet(argparse.Action):
    """Stores the sorted epochs of arguments of the type `epochs`."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, sorted(set(chain.from_iterable(values))))


def index(text: str) -> int:
    """Argument type: a whole number >= 0."""
    return _whole(text, 0)


def seed(text: str) -> int:
    """Argument type: a whole number from 0 to 2^31 - 1."""
    return _whole(text, 0, 2**31 - 1)


def csv_file(text: str) -> str:
    """Argument type: the name of a .csv file, beside which a .json file of the same name is written."""
    if not text.endswith(".csv"):
        raise argparse.ArgumentTypeError(f"{text} must end in .csv: a .json file is written beside it")
    return text


def bits(text: str) -> int:
    """Argument type: a bit-width, 2 to 8."""
    return _whole(text, 2, 8)


def bits_or_float(text: str) -> int:
    """Argument type: a bit-width, 2 to 8, or 32 for full precision."""
    try:
        return 32 if text == "32" else bits(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or 32 for full precision") from None
