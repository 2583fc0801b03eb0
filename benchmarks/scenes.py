"""Scenes of coloured shapes such as the small checkpoints were trained on, with the truth beside.

They are drawn from seeds that no checkpoint has seen: cells of 28 pixels, which are one image token each, on grey
noise; circles, squares and triangles of one or two cells a side.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

CELL = 28
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 80, 220),
    "yellow": (230, 210, 40),
    "purple": (150, 50, 180),
    "orange": (240, 140, 30),
}
GRIDS = ((3, 3), (3, 4), (4, 3), (4, 4), (4, 5), (5, 4), (5, 5))  # (columns, rows); narrower ones were not trained on
SHAPES = ("circle", "square", "triangle")


@dataclass(frozen=True)
class Scene:
    """image; boxes: (label, (x1, y1, x2, y2) in thousandths) of all there is; queries: labels to ask for."""

    image: Image.Image
    boxes: list[tuple[str, tuple[float, float, float, float]]]
    queries: list[str]

    def boxes_of(self, label: str) -> list[tuple[float, float, float, float]]:
        return [box for name, box in self.boxes if name == label]


def scenes(count: int, seed: int = 0) -> Iterator[Scene]:
    """`count` scenes, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield scene(rng)


def scene(rng: random.Random) -> Scene:
    columns, rows = rng.choice(GRIDS)
    width, height = columns * CELL, rows * CELL
    grey = 230 if rng.random() < 0.5 else rng.randint(40, 220)
    noise = np.random.default_rng(rng.randrange(1 << 32)).normal(0, 5, (height, width, 3))
    image = Image.fromarray((grey + noise).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    free = {(x, y) for x in range(columns) for y in range(rows)}
    boxes = []
    for _ in range(rng.randint(1, 6)):
        side = rng.choice([1, 1, 2])
        places = [(x, y) for x, y in sorted(free) if all((x + i, y + j) in free for i, j in cells(side))]
        if not places:
            continue
        x, y = rng.choice(places)
        free -= {(x + i, y + j) for i, j in cells(side)}
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        corners = (x * CELL, y * CELL, (x + side) * CELL - 1, (y + side) * CELL - 1)
        draw(pen, shape, corners, COLOURS[colour])
        box = (1000 * x / columns, 1000 * y / rows, 1000 * (x + side) / columns, 1000 * (y + side) / rows)
        boxes.append((f"{colour} {shape}", box))
    present = sorted({label for label, _ in boxes})
    queries = rng.sample(present, min(len(present), rng.randint(1, 3)))
    if rng.random() < 0.3:
        absent = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" not in present]
        queries.append(rng.choice(absent))
    return Scene(image, boxes, queries)


def cells(side: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(side) for j in range(side)]


def draw(pen: ImageDraw.ImageDraw, shape: str, corners: tuple[int, int, int, int], colour: tuple) -> None:
    x1, y1, x2, y2 = corners
    if shape == "circle":
        pen.ellipse(corners, fill=colour)
    elif shape == "square":
        pen.rectangle(corners, fill=colour)
    else:
        pen.polygon([((x1 + x2) // 2, y1), (x1, y2), (x2, y2)], fill=colour)
