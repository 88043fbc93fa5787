"""A font for every text: Pillow's own for ASCII, and fonts of this machine for the letters that it lacks."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import cache, lru_cache
from itertools import groupby

from PIL import ImageDraw, ImageFont

from samdetr.util.logger import log, printable

_NAMED: set[str] = set()  # class names that a note has been about
_JOINERS = "\u200c\u200d"  # shape the letters beside them, and need no font


class Font:
    """Measures and draws single lines in one size. Letters that no font has are drawn as boxes: see `drawable`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def getlength(self, text: str) -> float:
        return sum(_open(path, self.size).getlength(part) for path, part in _parts(text))

    def height(self, text: str) -> int:
        """Of a line with this text; equal for all ASCII."""
        return max(sum(_open(path, self.size).getmetrics()) for path in ("", *(path for path, _ in _parts(text))))

    def draw(
        self, drawing: ImageDraw.ImageDraw, place: tuple[float, float], text: str, *, fill: tuple[int, int, int]
    ) -> None:
        """Draw a line whose left end, in the middle of its height, is at `place`."""
        x, y = place
        for path, part in _parts(text):
            font = _open(path, self.size)
            drawing.text((x, y), part, fill=fill, font=font, anchor="lm")
            x += font.getlength(part)


def drawable(names: Mapping[int, str], ids: Mapping[int, int]) -> dict[int, str]:
    """The class names by label; the class's id instead where no font here has all letters, which one note says."""
    lacking = {label: name for label, name in names.items() if None in map(_font_of, _shown(name))}
    new = {*lacking.values()} - _NAMED
    if new:
        log(
            f"note: no font here has all letters of {len(new)} class name(s), such as {printable(min(new))}; their ids "
            "are drawn instead; with a font of that script installed (such as of the Noto family) names are"
        )
        _NAMED.update(new)
    return {**names, **{label: str(ids[label]) for label in lacking}}


@lru_cache(4096)
def _parts(text: str) -> list[tuple[str, str]]:
    """A line from left to right as parts of one font each: (path, text). "" is Pillow's own font."""
    text = _shown(text)
    if text.isascii():
        return [("", text)]
    needed = {ord(letter) for letter in text if letter not in _JOINERS}
    for path in _fonts():
        if needed <= letters(path):
            return [(path, text)]  # one alone knows the direction and the shapes of all words
    paths: list[str] = []
    for letter in text:
        before = paths[-1] if paths else ""
        kind = unicodedata.category(letter)
        joins = kind[0] in "MZPC"  # marks, spaces and the like
        stays = before and (ord(letter) in letters(before) or kind in ("Mn", "Cf"))
        paths.append(before if joins and stays else _font_of(letter) or "")
    return [(path, "".join(letter for _, letter in group)) for path, group in groupby(zip(paths, text), lambda p: p[0])]


def _shown(text: str) -> str:
    """A text as it is drawn: in one line, without marks of direction, which fonts show as boxes."""
    kept = "".join(c for c in unicodedata.normalize("NFC", text) if c in _JOINERS or unicodedata.category(c) != "Cf")
    return "".join(c if c in _JOINERS else printable(c) for c in kept)


@cache
def _font_of(letter: str) -> str | None:
    """The first font that has a letter, "" being Pillow's own; None if no font has it."""
    if letter.isascii() or letter in _JOINERS:
        return ""
    return next((path for path in _fonts() if ord(letter) in letters(path)), None)


@cache
def _fonts() -> list[str]:
    """Files of outline fonts: matplotlib's own first, which has the alphabets of Europe, then upright ones."""
    from matplotlib import font_manager, get_data_path

    own = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    others = sorted(font_manager.findSystemFonts(), key=lambda path: ("Regular" not in path, path))
    return [own, *others]


@cache
def letters(path: str) -> frozenset[int]:
    """Code points that a font file has; none if Pillow or matplotlib cannot use it."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(path, 20)  # refuses fonts of pictures in other sizes
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError, UnicodeError):
        return frozenset()


@cache
def _open(path: str, size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
