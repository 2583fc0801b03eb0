"""Scenes of coloured shapes such as the demo's checkpoint is trained on (demo/train.py), with the truth beside.

Pictures of 112 to 560 pixels a side, grey with noise, in three to six rows and columns of cells; up to eight shapes,
several of a kind, and mostly others of the same shape in another colour or of the same colour in another shape.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 80, 220),
    "yellow": (230, 210, 40),
    "purple": (150, 50, 180),
    "orange": (240, 140, 30),
}
_ACROSS, _DOWN = (1, 2, 2, 3, 3, 2, 2, 1, 1, 0, 0, 1), (0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 1, 1)
# Corners in fractions of the box, or how PIL draws it
SHAPES = {
    "circle": "ellipse",
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "cross": [(a / 3, b / 3) for a, b in zip(_ACROSS, _DOWN, strict=True)],
    "half circle": "pieslice",
}
LABELS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
ELSEWHERE = ("person", "car", "dog", "cat", "tree", "house", "bicycle", "bird", "chair", "bottle")
SMALLEST, LARGEST = 112, 560  # pixels a side
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """image; boxes: (label, (x1, y1, x2, y2) in thousandths) of all there is; queries: labels to ask for."""

    image: Image.Image
    boxes: list[tuple[str, Box]]
    queries: list[str]

    def boxes_of(self, label: str) -> list[Box]:
        """Of "red circle", or of "circle" in any colour."""
        return [box for name, box in self.boxes if label in (name, name.split(" ", 1)[1])]


def scenes(count: int, seed: int = 0) -> Iterator[Scene]:
    """`count` scenes, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield scene(rng)


def scene(rng: random.Random) -> Scene:
    long = SMALLEST * (LARGEST / SMALLEST) ** rng.random()
    width, height = rng.sample([round(long), max(SMALLEST, round(long * rng.uniform(0.6, 1)))], 2)
    grey = rng.choice([230, rng.randint(40, 220)])
    noise = np.random.default_rng(rng.randrange(1 << 32)).integers(-9, 10, (height, width, 3), dtype=np.int16)
    image = Image.fromarray((grey + noise).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    colours, shapes = rng.sample([*COLOURS], rng.choice([2, 2, 3])), rng.sample([*SHAPES], rng.choice([1, 2, 2]))
    if rng.random() < 0.2:
        colours, shapes = [*COLOURS], [*SHAPES]
    cell = min(width, height) / rng.choice([3, 4])
    columns, rows = min(6, round(width / cell)), min(6, round(height / cell))
    free = {(x, y) for x in range(columns) for y in range(rows)}
    boxes = []
    for _ in range(rng.randint(1, 8)):
        across = rng.choice([1, 1, 2])
        places = [(x, y) for x, y in sorted(free) if block(x, y, across) <= free]
        if not places:
            continue
        x, y = rng.choice(places)
        free -= block(x, y, across)
        colour, shape = rng.choice(colours), rng.choice(shapes)
        size = [across * side / cells for side, cells in ((width, columns), (height, rows))]
        left, top = x * width / columns, y * height / rows
        sides = [size[0], size[1] / 2 if shape == "half circle" else size[1]]
        corners = (left, top, left + sides[0], top + sides[1])
        draw(pen, shape, corners, COLOURS[colour], rng)
        box = tuple(1000 * value / side for value, side in zip(corners, (width, height) * 2, strict=True))
        boxes.append((f"{colour} {shape}", box))
    present = sorted({label for label, _ in boxes})
    queries = rng.sample(present, min(len(present), rng.randint(1, 3)))
    if rng.random() < 0.3:
        queries.append(absent(rng, present))
    return Scene(image, boxes, queries)


def block(x: int, y: int, side: int) -> set[tuple[int, int]]:
    return {(x + i, y + j) for i in range(side) for j in range(side)}


def absent(rng: random.Random, present: list[str]) -> str:
    """A label that is not there, but for one in six with its colour and its shape on other things."""
    words = [label.split(" ", 1) for label in present]
    mixed = {f"{one[0]} {other[1]}" for one in words for other in words} - set(present)
    if mixed and rng.random() < 0.5:
        return rng.choice(sorted(mixed))
    if rng.random() < 0.15:
        return rng.choice(ELSEWHERE)
    near = [label for label in LABELS if any(word in label.split(" ", 1) for one in words for word in one)]
    return rng.choice([label for label in near if label not in present])


def draw(pen: ImageDraw.ImageDraw, shape: str, corners: tuple, colour: tuple, rng: random.Random) -> None:
    x1, y1, x2, y2 = corners
    fill = tuple(max(0, min(255, value + rng.randint(-15, 15))) for value in colour)
    how = SHAPES[shape]
    if how == "ellipse":
        pen.ellipse((x1, y1, x2 - 1, y2 - 1), fill=fill)
    elif how == "pieslice":  # the upper half
        pen.pieslice((x1, y1, x2 - 1, y1 + 2 * (y2 - y1) - 1), 180, 360, fill=fill)
    else:
        pen.polygon([(x1 + a * (x2 - x1 - 1), y1 + b * (y2 - y1 - 1)) for a, b in how], fill=fill)
