# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The language of questions and answers: tasks to prompts, answers to labelled boxes and points."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# checkpoint.md, "Questions the model was trained on", word for word (its grammar slips included).
TASKS: dict[str, str] = {
    "detect": "Locate all the instances that matches the following description: {}.",
    "ground": "Locate all the instances that match the following description: {}.",
    "single": "Locate a single instance that matches the following description: {}.",
    "point": "Point to: {}.",
    "text": "Please locate the text referred as {}.",
    "gui": "Locate the region that matches the following description: {}.",
}
ALL_TEXT = "Detect all the text in box format."
SEPARATOR = "</c>"
# Special tokens of the vocabulary that carry an answer: what a reader keeps when the others are skipped.
ANSWER_TOKENS = frozenset(
    ["<ref>", "</ref>", "<box>", "</box>", SEPARATOR, *(f"<{coordinate}>" for coordinate in range(1001))]
)

_COORDINATE = r"<(?:0|[1-9][0-9]{0,2}|1000)>"
_PIECES = re.compile(rf"<ref>|</ref>|<box>(?:{_COORDINATE}{_COORDINATE}){{1,2}}</box>")
_NUMBER = re.compile(r"[0-9]+")


class Grounding(NamedTuple):
    """One thing found: a box or a point.

    label: the model's words for it, "" where it gave none.
    coordinates: thousandths of the image's width and height, 0…1000: (x_min, y_min, x_max, y_max) or (x, y).
    """

    label: str
    coordinates: tuple[int, ...]

    @property
    def is_point(self) -> bool:
        return len(self.coordinates) == 2


def build_question(task: str, queries: str | Iterable[str] = ()) -> str:
    """The question the model was trained on (checkpoint.md, "Prompt").

    Args:
        task: a key of `TASKS`.
        queries: what to look for. "detect" takes one or several, "text" one or none (then: all the text there is),
            the others one.

    Raises:
        ValueError: an unknown task, an empty query, or another number of queries than the task takes.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}; expected one of {', '.join(TASKS)}.")
    queries = [queries] if isinstance(queries, str) else list(queries)
    if not all(isinstance(query, str) and query.strip() for query in queries):
        raise ValueError(f"queries: got {queries!r}; expected texts that are not empty.")
    if task == "text" and not queries:
        return ALL_TEXT
    if not queries:
        raise ValueError(f"queries: got none; task {task!r} needs something to look for.")
    if len(queries) > 1 and task != "detect":
        raise ValueError(f"queries: got {len(queries)}; task {task!r} takes one (only 'detect' takes several).")
    return TASKS[task].format(SEPARATOR.join(queries))


def parse_answer(text: str) -> list[Grounding]:
    """Reads the boxes and points of an answer (decoding.md §1, "Output grammar").

    Only `<box>`, two or four coordinates of 0…1000 and `</box>`, with nothing between, count: `<box>none</box>` and
    anything malformed yield nothing. `<ref>…</ref>` labels what follows, up to the next; a label that is not closed
    ends where the next box begins. Never raises on a string, and takes time linear in its length.

    Args:
        text: an answer with its special tokens kept.

    Returns:
        Groundings in the order of the text. A box's corners are sorted.
    """
    return [grounding for grounding, *_ in parse_places(text)]


def parse_places(text: str) -> list[tuple[Grounding, range, range]]:
    """`parse_answer`, and where in the text each grounding stands.

    Returns:
        (grounding, characters of its label, characters from `<box>` to `</box>`). A label of several groundings is in
        one place; none is an empty one.
    """
    found: list[tuple[Grounding, range, range]] = []
    label, opened = range(0), None
    for piece in _PIECES.finditer(text):
        token = piece[0]
        if token == "<ref>":
            opened = piece.end()
            continue
        if opened is not None:
            label, opened = range(opened, piece.start()), None
        if token != "</ref>":
            numbers = tuple(map(int, _NUMBER.findall(token)))
            coordinates = numbers if len(numbers) == 2 else _sorted_corners(numbers)
            words = text[label.start : label.stop].strip()
            found.append((Grounding(words, coordinates), label, range(piece.start(), piece.end())))
    return found


def geometric_mean(log_probabilities: Sequence[float]) -> float:
    """exp of the mean, in [0, 1]: the probability of a token, on an average. 1 for no tokens.

    A value above 0, which rounding may make of a probability of 1, counts as 0.
    """
    if not log_probabilities:
        return 1.0
    return math.exp(sum(min(0.0, value) for value in log_probabilities) / len(log_probabilities))


def to_pixels(coordinates: Sequence[int], width: float, height: float) -> tuple[float, ...]:
    """Coordinates in thousandths, x and y in turn, as pixels of a `width`×`height` image.

    With a width and height of 1 they are fractions of the image's sides.
    """
    return tuple(value * (height if i % 2 else width) / 1000 for i, value in enumerate(coordinates))


def _sorted_corners(box: tuple[int, ...]) -> tuple[int, ...]:
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


__all__ = [
    "ANSWER_TOKENS",
    "TASKS",
    "Grounding",
    "build_question",
    "geometric_mean",
    "parse_answer",
    "parse_places",
    "to_pixels",
]
