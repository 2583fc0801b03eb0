# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""How well a model answers records: precision and recall in each mode, and what that costs."""

from collections.abc import Mapping, Sequence
from typing import Any

from training.data import messages_of

MODES = ("verified", "hybrid", "fast", "slow")
IOU, NEAR = 0.5, 0.05  # what a box has to reach; how far off a point may be, in shares of the picture's sides


def validate(model: Any, processor: Any, records: Sequence[Mapping[str, Any]], **told: Any) -> dict[str, dict]:
    """`scores` of `count`."""
    return {mode: scores(counts) for mode, counts in count(model, processor, records, **told).items()}


def count(
    model: Any, processor: Any, records: Sequence[Any], modes: Sequence[str] = MODES, rows: int = 16, limit: int = 512
) -> dict[str, list[int]]:
    """Asks every question of the records, with the true answers to those before it, greedily.

    Returns:
        Per mode how many boxes and points were right, were said and are there (right: with the label, a box at an IoU
        of at least 0.5, each thing once), and how many forwards and answers that took.
    """
    talks = [messages_of(record) for record in records]
    asked = [(talk[:at], talk[at]) for talk in talks for at, turn in enumerate(talk) if turn["role"] == "assistant"]
    counts = {mode: [0] * 5 for mode in modes}
    layout = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "padding": True}
    training = model.training
    model.eval()
    for start in range(0, len(asked), rows):
        some = asked[start : start + rows]
        inputs = processor.apply_chat_template([question for question, _ in some], **layout, return_tensors="pt")
        true = found(processor, ["".join(part["text"] for part in answer["content"]) for _, answer in some])
        for mode in modes:
            settings = {"generation_mode": mode, "max_new_tokens": limit, "return_dict_in_generate": True}
            output = model.generate(**inputs.to(model.device), **settings)
            given = found(processor, output)
            right = sum(matched(*pair) for pair in zip(given, true, strict=True))
            told = right, sum(map(len, given)), sum(map(len, true)), int(output.row_forwards.sum()), len(some)
            counts[mode] = [sum(pair) for pair in zip(counts[mode], told, strict=True)]
    model.train(training)
    return counts


def scores(counts: Sequence[float]) -> dict[str, float]:
    """`precision`, `recall` and `f1`; `said`, how many boxes and points; `forwards` an answer took."""
    right, said, there, forwards, answers = counts
    precision, recall, f1 = right / max(said, 1), right / max(there, 1), 2 * right / max(said + there, 1)
    return {"precision": precision, "recall": recall, "f1": f1, "said": said, "forwards": forwards / max(answers, 1)}


def found(processor: Any, outputs: Any) -> list[list[tuple[str, list[float]]]]:
    """(label, box or point in fractions of the sides) of each answer."""
    rows = processor.post_process_grounding(outputs)
    pairs = (("labels", "boxes"), ("point_labels", "points"))
    return [[each for a, b in pairs for each in zip(row[a], row[b].tolist(), strict=True)] for row in rows]


def matched(given: Sequence[tuple[str, list[float]]], true: Sequence[tuple[str, list[float]]]) -> int:
    """How many of the things there are were found, each by another box."""
    left, hits = list(true), 0
    for label, place in given:
        near = [thing for thing in left if thing[0] == label and len(thing[1]) == len(place)]
        best = max(near, key=lambda thing: closeness(place, thing[1]), default=None)
        if best is not None and closeness(place, best[1]) >= 0:
            left.remove(best)
            hits += 1
    return hits


def closeness(one: Sequence[float], other: Sequence[float]) -> float:
    """0 or more for a hit."""
    if len(one) == 2:
        return NEAR - max(abs(a - b) for a, b in zip(one, other, strict=True))
    return overlap(one, other) - IOU


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = (max(0.0, min(one[a + 2], other[a + 2]) - max(one[a], other[a])) for a in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / max(sum(areas) - width * height, 1e-12)
