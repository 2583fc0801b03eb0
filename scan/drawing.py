# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Boxes, points and labels on a picture."""

import colorsys
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .records import Detection

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

# PIL finds by name what the system has: fonts of most alphabets, of Chinese, Japanese and Korean, of others
FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "segoeui.ttf", "arial.ttf", "Arial.ttf",
    "LiberationSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "PingFang.ttc",
    "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "Nirmala.ttf",
    "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansThai-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf", "NotoSansBengali-Regular.ttf", "NotoSansTamil-Regular.ttf",
)  # fmt: skip
MOST_COVERED = 0.15  # of a picture, by labels: in a crowd the best have one


def draw(image: Image.Image, detections: Iterable[Detection], colours: dict[str, Colour]) -> Image.Image:
    """Draws boxes, labels over them and points over both on a copy of a picture.

    Labels lie beside each other and beside points. In a crowd those of the detections with the lower scores are left
    out; a long one is cut; one that would cover a quarter of the picture is not written.

    Args:
        image: the upright picture.
        detections: what was found in it, in its pixels.
        colours: label → RGB. Missing ones are added, each with a hue of its own.

    Returns:
        An RGB image of the same size.
    """
    canvas = image.copy() if image.mode == "RGB" else image.convert("RGB")
    pen = ImageDraw.Draw(canvas)
    width = max(1, round(min(canvas.size) / 200))
    found = sorted(detections, key=lambda one: -(one.score or 0.0))
    for one in reversed(found):
        colour = colours.setdefault(one.label, colour_of(len(colours)))
        if one.box:  # a dark and a light line about the coloured one show on any background
            pen.rectangle(_grown(one.box, 2), outline="black")
            pen.rectangle(_grown(one.box, 1), outline="white", width=width + 2)
            pen.rectangle(one.box, outline=colour, width=width)
    radius = 3 + 2 * width
    placed = [_grown((*one.point, *one.point), radius) for one in found if one.point]
    things, covered = [one.box for one in found if one.box], 0.0
    best = {one.label: one for one in reversed(found)}
    for one in sorted(found, key=lambda one: best[one.label] is not one):  # each label once, then the others
        place = _grown(one.box, 2) if one.box else _grown((*(one.point or (0, 0)),) * 2, radius)
        if covered < MOST_COVERED * canvas.width * canvas.height or best[one.label] is one:
            covered += _draw_label(pen, canvas.size, one, place, colours[one.label], things, placed)
    for one in found:
        if one.point:
            for less, fill in ((0, "black"), (1, "white"), (2, colours[one.label])):
                pen.ellipse(_grown((*one.point, *one.point), radius - less), fill=fill)
    return canvas


def _draw_label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    one: Detection,
    place: Box,
    colour: Colour,
    things: list[Box],
    placed: list[Box],
) -> float:
    """Writes a label about its place, off what is `placed` and where it hides least; returns how much it covers."""
    height = max(9 if min(size) < 160 else 11, min(round(min(size) / 36), 80))
    font, text = _written(one.label[:100], height)
    score = "" if one.score is None or size[0] < 16 * height else f" {one.score:.2f}"
    most = min(max(0.4 * size[0], 12 * height), size[0]) - 6
    while text and pen.textlength(f"{text}{score}", font=font) > most:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    text = f"{text}{score}".strip()
    wide, high = pen.textlength(text, font=font) + 5, float(round(height * 1.3))
    if not text or wide * high > size[0] * size[1] / 4:
        return 0
    left, top, right, bottom = place
    # Above the box, in it, below it, at its right; of a point beside it first
    corners = [(left, top - high), (left, top), (left, bottom), (left, bottom - high), (right, top)]
    if one.point:
        middle = (top + bottom - high) / 2
        corners = [(right, middle), (left - wide, middle), *corners]
    inside = [(min(max(x, 0), size[0] - wide - 1), min(max(y, 0), size[1] - high - 1)) for x, y in corners]
    boxes = [(x, y, x + wide, y + high) for x, y in inside]
    free = [box for box in boxes if not any(_shared(box, other) for other in placed)]
    if not free:
        return 0
    box = min(free, key=lambda box: sum(_shared(box, other) for other in things))
    placed.append(box)
    pen.rectangle(box, fill=colour)
    is_light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((box[0] + 3, box[1] + high / 2), text, "black" if is_light else "white", font, anchor="lm")
    return wide * high


@lru_cache(4096)
def _written(label: str, height: int) -> tuple[Any, str]:
    """A font and the text that it writes: where no font has all of a label, letters without their accents, or ?."""
    kept = (c if c.isprintable() else "" if unicodedata.category(c) == "Cf" else " " for c in label)
    text = unicodedata.normalize("NFC", " ".join("".join(kept).split()))
    name = max(_fonts(), key=lambda name: sum(_has(name, character) for character in text))
    if not all(_has(name, character) for character in text):
        bare = (c if _has(name, c) else unicodedata.normalize("NFD", c)[0] for c in text)
        text = "".join(c if _has(name, c) else "?" for c in bare if unicodedata.category(c)[0] != "M")
    return _font(name, height), text


@lru_cache(1)
def _fonts() -> list[str | None]:
    """Those of FONTS that there are, and PIL's own, which lacks even é."""
    return [name for name in FONTS if _font(name, 16)] + [None]


@lru_cache(256)
def _font(name: str | None, height: int) -> Any:
    try:
        return ImageFont.truetype(name, height) if name else ImageFont.load_default(height)
    except OSError:
        return None


@lru_cache(1 << 16)
def _has(name: str | None, character: str) -> bool:
    font = _font(name, 16)
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))  # what is drawn for missing ones


def colour_of(index: int) -> Colour:
    """RGB; steps of the golden ratio keep any number of hues apart."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.9, 0.95 - 0.3 * (index % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def _grown(box: Box, by: float) -> Box:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _shared(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
