"""Run folders: args.json, metrics.csv (a row per epoch), TensorBoard events and checkpoints of one training run."""

import csv
import fcntl
import json
import os
import socket
from argparse import Namespace
from pathlib import Path
from typing import Any

from utils.cli import UserError, first_line
from utils.files import git_commit, write_csv, write_json

ROOT = Path("runs")
SHOWN = 3  # runs that a message names
KEPT_BY_RESUMES = ("epoch", "save_epochs", "precision", "compile")  # settings of a resume that later resumes keep


def default_exp_name(args: Namespace) -> str:
    """Data set and goal: cifar100/4bits, digits/sparse90, cifar10/vanilla; the target of `args` must be resolved."""
    goal = f"sparse{100 * args.sparsity:g}" if args.target == "zero" else f"{args.w_bit}bits"
    return f"{args.dataset}/{goal if args.psg else 'vanilla'}"


class RunFolder:
    """One folder under runs/. `create` never reuses a folder that has an epoch in it; `reopen` continues in one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.csv"
        self.last_checkpoint = path / "last.pth"

    @property
    def exp_name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @classmethod
    def create(cls, exp_name: str) -> "RunFolder":
        """A locked folder runs/<exp_name>, or <exp_name>-2, -3 ... if that has a run in it or is in use.

        What a run that ended in its first epoch left behind is removed. UserError if the folder cannot be made.
        """
        name = str(Path(exp_name))
        if Path(name).is_absolute() or ".." in Path(name).parts or name == ".":
            raise UserError(f"--exp_name {exp_name!r} must name a folder below {ROOT}/")
        path, attempt = ROOT / name, 1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not (folder := cls(path))._claim():
                attempt += 1
                path = ROOT / f"{name}-{attempt}"
        except OSError as error:
            reason = f"run folder {path} cannot be made ({error.strerror})"
            raise UserError(f"{reason}: choose another --exp_name") from None
        return folder

    def _claim(self) -> bool:
        """Makes the folder, or takes an existing one that holds no run and is not in use; locks and clears it."""
        try:
            self.path.mkdir()
        except FileExistsError:
            if not self.path.is_dir() or not self._holds_no_epoch():
                return False
        try:
            self.lock()
        except UserError:
            return False
        if not self._holds_no_epoch():  # another process was faster, and has ended
            self._lock.close()
            return False
        for leftover in self._files():
            leftover.unlink()
        return True

    def _files(self) -> list[Path]:
        """What is in the folder beside the lock."""
        return [file for file in self.path.iterdir() if file.name != "lock"]

    def _holds_no_epoch(self) -> bool:
        """Whether the folder holds only what a run writes before the end of its first epoch."""
        early = ("args.json", "events.out.tfevents.*", "*.tmp")
        return all(file.is_file() and any(map(file.match, early)) for file in self._files())

    @classmethod
    def reopen(cls, exp_name: str) -> "RunFolder":
        """The existing folder runs/<exp_name>. Raises UserError, which names the newest runs that can be resumed, if
        it has no checkpoint."""
        folder = cls(ROOT / exp_name)
        if not folder.last_checkpoint.is_file():
            found = sorted(ROOT.rglob("last.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
            names = [str(path.parent.relative_to(ROOT)) for path in found]
            advice = "start without --resume"
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                advice += f", or choose --exp_name {', '.join(names[:SHOWN])}{more}"
            raise UserError(f"nothing to resume: {folder.last_checkpoint} is not there; {advice}")
        return folder

    def lock(self) -> None:
        """Makes this process the only one that writes here until it ends, and removes the half-written files of a
        process that was killed; UserError, which names the other process, if there is one."""
        try:
            self._lock = open(self.path / "lock", "a+")  # noqa: SIM115 - held until this process ends
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # not flock: worker processes would inherit that and outlive this one
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(f"{self.path} is in use by {holder}: wait for it, or choose another --exp_name") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        for half in self.path.glob("*.tmp"):
            half.unlink(missing_ok=True)

    def settings(self) -> dict[str, Any]:
        """What args.json holds: args, command, commit, versions, and the epochs at which the run was resumed."""
        try:
            settings = json.loads((self.path / "args.json").read_text())
            if not (isinstance(settings, dict) and isinstance(settings.get("args"), dict)):
                raise ValueError("it has no args of train.py")
            return settings
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / 'args.json'} cannot be read ({first_line(error)})") from None

    def latest_args(self) -> dict[str, Any]:
        """The run's args, with those of KEPT_BY_RESUMES as they were at the last resume."""
        settings = self.settings()
        last = settings.get("resumed", [{}])[-1]
        return settings["args"] | {key: last[key] for key in KEPT_BY_RESUMES if key in last}

    def note_resume(self, after_epoch: int, **facts: Any) -> None:
        """Adds a resume, with the commit it runs at, to args.json."""
        settings = self.settings()
        settings.setdefault("resumed", []).append({"after_epoch": after_epoch, "commit": git_commit(), **facts})
        self.write_settings(settings)

    def write_settings(self, settings: dict[str, Any]) -> None:
        write_json(self.path / "args.json", settings)

    def start_logging(self, after_epoch: int) -> None:
        """Opens the logs and drops what was written past `after_epoch`, the epoch of the checkpoint that is resumed."""
        from torch.utils.tensorboard import SummaryWriter

        if self.metrics_path.exists():
            with open(self.metrics_path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values()]
            try:
                kept = [row for row in rows if float(row["epoch"]) <= after_epoch]
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{self.metrics_path} has no epochs: move it away, and a new one is started") from None
            if kept:
                write_csv(self.metrics_path, kept)
            else:
                self.metrics_path.unlink()
        self._writer: SummaryWriter = SummaryWriter(self.path, purge_step=after_epoch + 1)

    def log(self, row: dict[str, float]) -> None:
        """Appends an epoch's row, whose first key is "epoch", to metrics.csv and TensorBoard."""
        rows: list[dict[str, Any]] = [row]
        if self.metrics_path.exists():
            with open(self.metrics_path, newline="") as file:
                rows = [*csv.DictReader(file), row]
        empty = {key: "" for known in rows for key in known}  # an older version may have begun with fewer columns
        write_csv(self.metrics_path, [empty | known for known in rows])
        for key, value in row.items():
            if key != "epoch":
                self._writer.add_scalar(key, value, row["epoch"])
        self._writer.flush()
