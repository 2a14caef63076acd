"""Files that are written whole or not at all, and results with the command and commit that made them."""

import contextlib
import csv
import io
import json
import math
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from utils.cli import UserError, first_line


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, used by this call only; renamed to `path` if the block succeeds, else removed.

    Raises UserError if `path` is a folder, and for an OSError of the block or the renaming; the old `path` then stays.
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = f"could not be written ({error.strerror or first_line(error)})"
        raise UserError(f"{path} {reason}; what was there before is intact") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file under a temporary name beside `path`; flushed to disk and renamed to it if the block succeeds.

    Raises UserError if it cannot be written; the old `path` then stays.
    """
    with replacing(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # as torch.save reports a full disk
            raise OSError(first_line(error)) from None


@contextlib.contextmanager
def output_folder(flag: str, path: str | Path) -> Iterator[Path]:
    """The folder `path`, the value of `flag`, made if it does not exist, for a block that writes there.

    Raises UserError before the block if nothing can be written there. If the block fails, the folders that were made
    for it and are still empty are removed.
    """
    folder = Path(path)
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{flag} {path} cannot be made ({_in_the_way(folder, error)}): name another folder"
            ) from None
        check_writable(flag, path, folder)
        yield folder
    except BaseException:
        for place in made:  # the innermost first
            with contextlib.suppress(OSError):
                place.rmdir()
        raise


def check_output_file(flag: str, path: str | Path) -> None:
    """Raises UserError if no file `path`, the value of `flag`, can be written: call it before the work."""
    folder = Path(path).parent
    if not Path(path).name or os.path.isdir(path):
        raise UserError(f"{flag} {path} is a folder: name a file")
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {path} cannot be written: there is no folder {folder}; make it first")
    check_writable(flag, path, folder)


def write_page(path: str, page: Callable[[], str]) -> None:
    """Writes the text that `page` makes to the file `path`, the value of --out, and prints `path`.

    Raises UserError, before `page` is called, if the file cannot be written.
    """
    check_output_file("--out", path)
    text = page()
    with atomic_write(path) as file:
        file.write(text.encode())
    print(path)


def check_writable(flag: str, path: str | Path, folder: Path) -> None:
    """Raises UserError, with `flag` and its value `path`, if no file can be made in `folder`."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{flag} {path} cannot be written to ({reason}): name another, or make it writable") from None


def _in_the_way(folder: Path, error: OSError) -> str:
    """Why `folder` cannot be made: what is there instead, or what the system says."""
    taken = [place for place in (folder, *folder.parents) if os.path.lexists(place) and not os.path.isdir(place)]
    return f"{taken[0]} is not a folder" if taken else error.strerror or first_line(error)


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content`, with null for numbers that are not finite, which JSON does not have."""
    with atomic_write(path) as file:
        file.write((json.dumps(_finite(content), indent=2, allow_nan=False) + "\n").encode())


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_csv(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes `rows`, with the keys of the first one as header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def write_results(folder: str | Path, rows: list[dict[str, Any]], **facts: Any) -> None:
    """results.csv (the rows) and results.json (command, commit, `facts` and the rows) in an existing folder."""
    content = {"command": command_line(), "commit": git_commit(), **facts, "rows": rows}
    write_csv(Path(folder) / "results.csv", rows)
    write_json(Path(folder) / "results.json", content)


def command_line() -> str:
    """The command that is running, as it can be typed again."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m NAME`; None for a script
    return shlex.join(["python", *(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])


@cache
def git_commit() -> str:
    """Commit of the code, with "+changes" if tracked files differ from it; "unknown" outside a checkout.

    As of the first call: results that this process overwrites are not changes to its code.
    """

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The lines of a Markdown table, each with its end."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (heads, ["---"] * len(heads), *rows))
