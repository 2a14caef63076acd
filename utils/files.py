"""Files that are either whole or not there, and results with the command and commit that made them."""

import contextlib
import csv
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from utils.cli import UserError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file under a temporary name beside `path`; flushed to disk and renamed to it when the block ends well.

    Raises UserError if it cannot be written; what `path` was before then stays.
    """
    path = Path(path)
    if not path.name:
        raise UserError(f"{path} is a folder: name a file")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} could not be written ({reason}); what was there before is intact") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: str | Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """`rows` with the keys of the first as header."""
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
    """The command that runs, as it can be typed again."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m NAME`; None for a script
    return shlex.join(["python", *(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]])


@cache
def git_commit() -> str:
    """Commit of the code, with "+changes" if tracked files differ from it; "unknown" outside a checkout.

    As it was at the first call: results that this process writes over older ones are no changes to its code.
    """

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
