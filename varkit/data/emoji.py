"""The colour emoji of an installed font, with their Unicode names as captions: about 1400 captioned pictures.

The trick: a font is asked for each code point by drawing it; one that it lacks looks like a code point that
no font has.
"""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from varkit.data.base import Batch, FiniteDataset, Report, Side, printable
from varkit.errors import UserError

FONT_VARIABLE = "VARKIT_EMOJI_FONT"
FONT_NAMES = ("NotoColorEmoji.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf")
BITMAP_SIZES = (109, 160)  # of Noto's and of Apple's bitmaps; a scalable font takes the first
ABSENT = "\U0010ffff"
CODE_POINTS = (0xA9, 0xAE, *range(0x203C, 0x3300), *range(0x1F000, 0x1FB00))


class Emoji(FiniteDataset):
    """Every named emoji of one code point that the font draws, on white, whole at any side.

    The font is `font_path`, or $VARKIT_EMOJI_FONT, or an installed Noto, Apple or Segoe colour font. Names
    are those of Python's Unicode tables, so a newer Python may know a few more.
    """

    def __init__(self, font_path: str | Path | None = None) -> None:
        self.font = find_font(font_path)
        self.characters = _drawn_characters(self.font)
        if not self.characters:
            raise UserError(
                f"font {printable(str(self.font.path))} has no emoji that Pillow can draw; {_remedy()}"
            )
        self.keys = [unicodedata.name(character).lower() for character in self.characters]
        self.report = Report()
        self._glyphs: dict[str, Image.Image] = {}

    def take(self, rows: Sequence[int]) -> Self:
        view = super().take(rows)
        view.characters = [self.characters[row] for row in rows]
        return view

    def batch(self, indices: Sequence[int], side: Side, crops: np.ndarray | None = None) -> Batch:
        images = np.empty((len(indices), *side, 3), np.uint8)
        for image, index in zip(images, indices, strict=True):
            glyph = self._glyph(self.characters[index])
            image[:] = np.asarray(ImageOps.pad(glyph, side[::-1], Image.Resampling.LANCZOS, color="white"))
        return Batch(images, captions=[self.keys[index] for index in indices])

    def _glyph(self, character: str) -> Image.Image:
        """Return the drawing, kept once made: all of them take about 80 MB."""
        if character not in self._glyphs:
            self._glyphs[character] = _draw(self.font, character)
        return self._glyphs[character]


def find_font(path: str | Path | None = None) -> ImageFont.FreeTypeFont:
    """Return the font at `path`, the one of $VARKIT_EMOJI_FONT, or the first known one that is installed."""
    chosen = path or os.environ.get(FONT_VARIABLE)
    for name in [str(chosen)] if chosen else FONT_NAMES:
        for size in BITMAP_SIZES:
            try:
                return ImageFont.truetype(name, size)  # looks in the system's font folders for a bare name
            except OSError:
                continue
    if chosen:
        raise UserError(f"{printable(str(chosen))} is not a font file that can be opened; {_remedy()}")
    raise UserError(f"no colour emoji font is installed; {_remedy()}")


def _remedy() -> str:
    return f"install one (apt-get install fonts-noto-color-emoji) or set {FONT_VARIABLE} to the file of one"


def _drawn_characters(font: ImageFont.FreeTypeFont) -> list[str]:
    symbols = [chr(code) for code in CODE_POINTS if unicodedata.name(chr(code), "")]
    inked = [symbol for symbol in symbols if _has_ink(font, symbol)]
    if not _has_ink(font, ABSENT):
        return inked
    absent = _draw(font, ABSENT)
    return [symbol for symbol in inked if _draw(font, symbol) != absent]


def _has_ink(font: ImageFont.FreeTypeFont, character: str) -> bool:
    left, top, right, bottom = font.getbbox(character, mode="RGBA")
    return right > left and bottom > top


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """Return the glyph on a white square."""
    left, top, right, bottom = font.getbbox(character, mode="RGBA")
    side = int(max(right - left, bottom - top))
    glyph = Image.new("RGB", (side, side), "white")
    at = ((side - (right - left)) / 2 - left, (side - (bottom - top)) / 2 - top)
    ImageDraw.Draw(glyph).text(at, character, font=font, embedded_color=True)
    return glyph
