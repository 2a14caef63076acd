"""Ctrl-C and SIGTERM: the current step is finished, then the run ends.

SLURM, systemd and a terminal signal every process of a program. Those that read images leave the reaction to their
parent.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
NUMBERS = (signal.SIGINT, signal.SIGTERM)
DEFAULTS = (signal.default_int_handler, signal.SIG_DFL)
LATE = 1.0  # seconds that a signal sent to two processes may come after the end of the other one


class Stopped(BaseException):
    """SIGINT or SIGTERM came; `exit_code` is 128 + its number, as a shell expects. The message has the advice.

    It is not an Exception: like KeyboardInterrupt, it is not for code that handles failures.
    """

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}" + (f"; {advice}" if advice else ""))
        self.exit_code = 128 + number


def let_go() -> None:
    """Makes the next SIGINT or SIGTERM act at once, as by default.

    Under torchrun both are ignored: torchrun passes on signals that its processes may have received themselves, and
    kills them after half a minute.
    """
    defaults: tuple[Any, ...] = (signal.SIG_IGN,) * 2 if "TORCHELASTIC_RUN_ID" in os.environ else DEFAULTS
    for number, handler in zip(NUMBERS, defaults):
        signal.signal(number, handler)


class StopRequest:
    """Notes the first SIGINT or SIGTERM after its creation; a second one acts at once (`let_go`).

    `StopRequest.latest` is the active one, or None.
    """

    latest: "StopRequest | None" = None

    def __init__(self) -> None:
        self.number, self.advice = 0, ""
        StopRequest.latest = self
        for number in NUMBERS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        let_go()

    def check(self) -> None:
        """Raises Stopped if a signal came."""
        if self.number:
            raise Stopped(self.number, self.advice)

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, until a signal comes: then Stopped instead of the next one."""
        for item in items:
            self.check()
            yield item
        self.check()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """A block in which SIGTERM raises Stopped, as SIGINT raises KeyboardInterrupt, so that open resources are closed.

    A StopRequest that is made in the block takes over. Afterwards both signals act as they did before.
    """

    def end(number: int, frame: object) -> None:
        let_go()
        raise Stopped(number)

    before = [signal.getsignal(number) for number in NUMBERS]
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        StopRequest.latest = None
        for number, handler in zip(NUMBERS, before):
            signal.signal(number, handler)


def stop_behind(wait: bool) -> None:
    """Raises Stopped if a StopRequest has noted a signal. For a failure that may come from the end of another process,
    which the same signal ended. `wait`: also if one is noted within LATE seconds.
    """
    request = StopRequest.latest
    if request is None:
        return
    deadline = time.monotonic() + LATE
    while wait and not request.number and time.monotonic() < deadline:
        time.sleep(0.05)
    request.check()


def outlive_signals(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: the worker ignores SIGINT, and SIGTERM unless its parent sends it.

    The parent reacts to the signal, and ends its workers when it ends. A worker whose parent is gone ends by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process at a SIGTERM from the process `parent`; torch sends one to a worker that does not end."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
