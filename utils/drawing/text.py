"""Text in figures as it is written: matplotlib must not interpret the user's labels, paths and layer names."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from utils.cli import warn

LAST_RESORT = "Last Resort"  # matplotlib's font with a box for every character
_told: set[str] = set()  # characters that a warning has named


def as_written(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator of a drawing function: no text of its figure is read as mathematics, and characters that its font lacks
    are taken from other fonts of this machine. A warning names those that no font has, once."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        figure = draw(*args, **kwargs)
        powers = _power_labels(figure)
        texts = [text for text in figure.findobj(Text) if text not in powers]
        for text in texts:
            text.set_parse_math(False)
            text.set_text(text.get_text().encode(errors="replace").decode())  # a path may have bytes that are not UTF-8
        _find_fonts(texts)
        return figure

    return drawn


def add_legend(owner: Axes | Figure, handles: Iterable[Artist], labels: Sequence[str], **options) -> Legend:
    """A legend of all `labels`; matplotlib would leave out those that begin with "_"."""
    legend = owner.legend([*handles], [str(number) for number in range(len(labels))], **options)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
    return legend


def save_png(figure: Figure, path: Path) -> None:
    """Writes `figure` as PNG, whatever the suffix of `path`, without matplotlib's warnings of missing characters, as
    `as_written` has told of each once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(path, format="png", dpi=130)


def _power_labels(figure: Figure) -> set[Text]:
    """The numbers at logarithmic axes, which are matplotlib's own and written as powers."""
    sides = [side for axis in figure.axes for side in (axis.xaxis, axis.yaxis) if side.get_scale() == "log"]
    return {text for side in sides for text in side.findobj(Text) if text is not side.label}


def _lacks(path: str, characters: Iterable[str]) -> set[str]:
    """Those of `characters` that the font at `path` lacks; all of them if it cannot be read."""
    with contextlib.suppress(OSError, RuntimeError):
        font = font_manager.get_font(path)
        return {character for character in characters if not font.get_char_index(ord(character))}
    return set(characters)


def _find_fonts(texts: list[Text]) -> None:
    for text in texts:
        rare = {character for character in text.get_text() if not character.isascii() and not character.isspace()}
        missing = _lacks(font_manager.findfont(text.get_fontproperties()), rare) if rare else rare
        if not missing:
            continue
        names, missing = _other_fonts(frozenset(missing))
        text.set_fontfamily([*text.get_fontfamily(), *names])
        if missing - _told:
            _told.update(missing)
            shown = "".join(sorted(missing))
            advice = "boxes are drawn instead; give other names, or install a font"
            warn(f"no font here has {shown} of {text.get_text()!r}: {advice}")


@functools.cache
def file_of(family: str) -> str:
    """The file that matplotlib takes for a font family, of those with other weights and slants."""
    return font_manager.findfont(font_manager.FontProperties(family=[family]))


def _other_fonts(missing: frozenset[str]) -> tuple[list[str], set[str]]:
    """Font families that together have as many of the characters `missing` as possible, and those that none has."""
    names, left = [], set(missing)
    for name in dict.fromkeys(font.name for font in font_manager.fontManager.ttflist if LAST_RESORT not in font.name):
        lacking = _lacks(file_of(name), left) if left else left
        if lacking < left:
            names.append(name)
            left = lacking
    return names, left
