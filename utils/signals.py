"""Ctrl-C and SIGTERM: the step that runs is ended, then the run."""

import signal
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Stopped(Exception):  # noqa: N818 - no error: somebody asked for it
    """SIGINT or SIGTERM came; `exit_code` is 128 + its number, as a shell expects. The message has the advice."""

    def __init__(self, number: int, advice: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}" + (f"; {advice}" if advice else ""))
        self.exit_code = 128 + number


class StopRequest:
    """From its creation on, notes the first SIGINT or SIGTERM; a second one acts at once, as by default."""

    def __init__(self) -> None:
        self.number, self.advice = 0, ""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

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
