# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""How well a model answers records: precision and recall in each mode, and what that costs."""

from collections.abc import Mapping, Sequence
from typing import Any

from training.data import messages_of

MODES = ("verified", "hybrid", "fast", "slow")
IOU = 0.5  # that a box has to reach
NEAR = 0.05  # of the picture's side: how far off a point may be


def validate(
    model: Any,
    processor: Any,
    records: Sequence[Mapping[str, Any]],
    modes: Sequence[str] = MODES,
    rows: int = 16,
    max_new_tokens: int = 512,
) -> dict[str, dict[str, float]]:
    """Asks every question of the records, with the true answers to those before it, greedily.

    Returns:
        Per mode `precision`, `recall` and `f1` of boxes (IoU of at least 0.5) and points with the right label, each
        thing found once, `said`, how many boxes and points that were, and `forwards` an answer took on average.
    """
    talks = [messages_of(record) for record in records]
    asked = [(talk[:at], talk[at]) for talk in talks for at, turn in enumerate(talk) if turn["role"] == "assistant"]
    result = {}
    training = model.training
    model.eval()
    for mode in modes:
        hits = said = things = forwards = 0
        for start in range(0, len(asked), rows):
            some = asked[start : start + rows]
            inputs = processor.apply_chat_template(
                [question for question, _ in some],
                add_generation_prompt=True,
                tokenize=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            ).to(model.device)
            output = model.generate(
                **inputs, generation_mode=mode, max_new_tokens=max_new_tokens, return_dict_in_generate=True
            )
            answers = ["".join(part["text"] for part in answer["content"]) for _, answer in some]
            pairs = zip(found(processor, output), found(processor, answers), strict=True)
            for given, true in pairs:
                hits += matched(given, true)
                said += len(given)
                things += len(true)
            forwards += int(output.row_forwards.sum())
        precision, recall = hits / max(said, 1), hits / max(things, 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        told = {"precision": precision, "recall": recall, "f1": f1, "forwards": forwards / max(len(asked), 1)}
        result[mode] = {name: round(value, 4) for name, value in told.items()} | {"said": said}
    model.train(training)
    return result


def found(processor: Any, outputs: Any) -> list[list[tuple[str, list[float]]]]:
    """(label, box or point in fractions of the sides) of each answer."""
    return [
        [
            *zip(row["labels"], row["boxes"].tolist(), strict=True),
            *zip(row["point_labels"], row["points"].tolist(), strict=True),
        ]
        for row in processor.post_process_grounding(outputs)
    ]


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
    width, height = (max(0.0, min(one[a + 2], other[a + 2]) - max(one[a], other[a])) for a in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / max(sum(areas) - width * height, 1e-12) - IOU
