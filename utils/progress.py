"""Progress of a loop: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
INTERVAL = 30.0  # seconds between lines


def shown(items: Iterable[Item], title: str, total: int, silent: bool = False) -> Iterator[Item]:
    """`items`, of which there are `total`; meanwhile stderr shows under `title` how many are done and the time left.

    On a terminal this is a bar, which disappears at the end. Elsewhere it is a line every INTERVAL seconds, so that a
    shorter loop writes nothing. Nothing is read back from a device. `silent` shows nothing.
    """
    if silent:
        return iter(items)
    if sys.stderr.isatty():
        return iter(tqdm(items, title, total, leave=False, delay=1))
    return _with_lines(items, title, total)


def _with_lines(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    started = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - told >= INTERVAL:
            told = now
            left = (now - started) / done * (total - done)
            print(f"{title}: step {done} of {total}, {duration(left)} left", file=sys.stderr, flush=True)
        yield item


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
