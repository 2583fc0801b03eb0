# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What `generate` returned, or its text → labelled boxes and points with scores, in tensors."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile
from numbers import Integral
from typing import Any

import numpy as np
import torch

from .conversations import ANSWER_START, TURN_END, TURN_START
from .grounding import ANSWER_TOKENS, Grounding, geometric_mean, parse_answer, parse_places, to_pixels
from .image_processing import is_array, is_list, is_number, to_list

_ROLE = ANSWER_START.removeprefix(TURN_START)
_WORD = "·"  # an ordinary token, where only the vocabulary's own count


def read_answers(tokenizer: Any, outputs: Any, target_sizes: Any, threshold: float | None) -> list[dict[str, Any]]:
    """`LocateAnythingProcessor.post_process_grounding`, whose docstring tells of arguments, returns and errors."""
    scores: Any = getattr(outputs, "scores", None)
    if threshold is not None:
        _check_threshold(threshold, scores)
    outputs = getattr(outputs, "sequences", outputs)
    if is_array(scores):
        return _read_scored(tokenizer, id_rows(outputs), scores, target_sizes, threshold or 0.0)
    if isinstance(outputs, str):
        outputs = [outputs]
    if is_list(outputs) and all(isinstance(row, str) for row in outputs):
        rows = [parse_answer(_answer_of(text)) for text in outputs]
    else:
        marks = _marks(tokenizer)
        answers = [_answer_in(tokenizer, ids) for ids in id_rows(outputs)]
        rows = [[item for item, *_ in _places(tokenizer, ids, marks)] for ids in answers]
    sizes = _sizes(target_sizes, len(rows))
    return [_in_tensors(items, width, height) for items, (height, width) in zip(rows, sizes, strict=True)]


def id_rows(outputs: Any) -> list[list[int]]:
    """Ids `[rows, length]` or `[length]`, as a tensor, array or lists → one list a row.

    Raises:
        ValueError: something else.
    """
    rows = to_list(outputs, "outputs") if is_array(outputs) else outputs
    if is_list(rows):
        rows = [to_list(row, "outputs") if is_array(row) else row for row in rows]
        if all(isinstance(row, Integral) for row in rows):
            rows = [rows] if rows else []
        if all(is_list(row) and all(isinstance(index, Integral) for index in row) for row in rows):
            return [list(map(int, row)) for row in rows]
    raise ValueError(f"outputs: got {type(outputs).__name__}; expected token ids [rows, length] or lists of them.")


def decode_ids(tokenizer: Any, ids: Sequence[int], **kwargs: Any) -> str:
    """Ids to text, special tokens kept. Ids that no vocabulary has, as -100 for "ignore", say nothing."""
    size = len(tokenizer)
    return tokenizer.decode([i for i in ids if 0 <= i < size], skip_special_tokens=False, **kwargs)


def _marks(tokenizer: Any) -> dict[int, str]:
    """The tokens of the vocabulary that make an answer's boxes and labels."""
    added = tokenizer.added_tokens_decoder.items()
    return {index: token.content for index, token in added if token.content in ANSWER_TOKENS}


def _places(tokenizer: Any, ids: Sequence[int], marks: Mapping[int, str]) -> list[tuple[Grounding, range, range]]:
    """`parse_places` of an answer's ids; the ranges are of tokens."""
    pieces = [marks.get(index, _WORD) for index in ids]
    ends = list(accumulate(map(len, pieces)))
    found = []
    for item, *places in parse_places("".join(pieces)):
        label, box = (
            range(bisect_right(ends, place.start), bisect_left(ends, place.stop) + 1) if place else range(0)
            for place in places
        )
        words = decode_ids(tokenizer, [ids[i] for i in label]).strip()
        found.append((item._replace(label=words), label, box))
    return found


def _answer_in(tokenizer: Any, ids: list[int]) -> list[int]:
    """`_answer_of` by ids: turns are opened and closed by the vocabulary's own tokens only."""
    start, end = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
    openings = [place for place, index in enumerate(ids) if index == start]
    answer = [] if openings else ids
    for opening in reversed(openings):
        opened = (
            stop
            for stop in range(opening + 1, min(opening + 1 + len(_ROLE), len(ids)) + 1)
            if decode_ids(tokenizer, ids[opening + 1 : stop]).startswith(_ROLE)
        )
        stop = next(opened, None)
        if stop is not None:
            answer = ids[stop:]
            break
    return list(takewhile(lambda index: index != end, answer))


def _answer_of(text: str) -> str:
    _, opening, answer = text.rpartition(ANSWER_START)
    if not opening and TURN_START in text:  # a prompt without an answer
        return ""
    return answer.partition(TURN_END)[0]


def _read_scored(
    tokenizer: Any, rows: list[list[int]], scores: torch.Tensor | np.ndarray, target_sizes: Any, threshold: float
) -> list[dict[str, Any]]:
    """rows: ids `[rows, prompt + new]`. scores: `[rows, new]` log-probabilities, NaN on padding."""
    fits = scores.ndim == 2 and len(scores) == len(rows) and all(len(row) >= scores.shape[1] for row in rows)
    floating = scores.is_floating_point() if isinstance(scores, torch.Tensor) else scores.dtype.kind == "f"
    if not fits or not floating:
        raise ValueError(
            f"outputs: got scores {scores.dtype} {list(scores.shape)} for {len(rows)} sequence(s) of "
            f"{sorted(set(map(len, rows)))} ids; expected floating point [rows, new ids]."
        )
    end, marks = tokenizer.convert_tokens_to_ids(TURN_END), _marks(tokenizer)
    found = []
    sizes = _sizes(target_sizes, len(rows))
    lines = to_list(scores, "outputs.scores")
    for ids, values, (height, width) in zip(rows, lines, sizes, strict=True):
        ids = ids[len(ids) - len(values) :]
        told = takewhile(lambda pair: pair[0] != end and not math.isnan(pair[1]), zip(ids, values, strict=True))
        items, box_scores, label_scores = [], [], []
        for item, label, box in _places(tokenizer, [index for index, _ in told], marks):
            score = geometric_mean([values[i] for i in box[1:-1]])
            if np.float32(score) < np.float32(threshold):  # scores come out in float32
                continue
            items.append(item)
            box_scores.append(score)
            label_scores.append(geometric_mean([values[i] for i in label]))
        found.append(_in_tensors(items, width, height, box_scores, label_scores))
    return found


def _in_tensors(
    items: list[Grounding],
    width: float,
    height: float,
    scores: list[float] | None = None,
    label_scores: list[float] | None = None,
) -> dict[str, Any]:
    """Boxes and points apart, in pixels of a `width`×`height` image."""
    found: dict[str, Any] = {}
    for kind, prefix, places in (("boxes", "", 4), ("points", "point_", 2)):
        own = [i for i, item in enumerate(items) if len(item.coordinates) == places]
        coordinates = [to_pixels(items[i].coordinates, width, height) for i in own]
        found[kind] = torch.tensor(coordinates, dtype=torch.float32).view(-1, places)
        found[f"{prefix}labels"] = [items[i].label for i in own]
        if scores is not None and label_scores is not None:
            found[f"{prefix}scores"] = torch.tensor([scores[i] for i in own], dtype=torch.float32)
            found[f"{prefix}label_scores"] = torch.tensor([label_scores[i] for i in own], dtype=torch.float32)
    return found


def _sizes(target_sizes: Any, rows: int) -> list[tuple[float, float]]:
    if target_sizes is None:
        return [(1, 1)] * rows
    sizes = to_list(target_sizes, "target_sizes") if is_array(target_sizes) else target_sizes
    if not is_list(sizes) or len(sizes) != rows:
        raise ValueError(f"target_sizes: got {sizes!r} for {rows} row(s); expected one (height, width) per row.")
    checked = []
    for size in sizes:
        pair = to_list(size, "target_sizes") if is_array(size) else size
        if not is_list(pair) or len(pair) != 2 or not all(is_number(s) and s > 0 for s in pair):
            raise ValueError(f"target_sizes: got {size!r}; expected (height, width) in pixels.")
        checked.append((pair[0], pair[1]))
    return checked


def _check_threshold(threshold: Any, scores: Any) -> None:
    number = isinstance(threshold, (int, float, np.floating)) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold <= 1:
        raise ValueError(f"threshold: got {threshold!r}; expected a number from 0 to 1.")
    if not is_array(scores):
        raise ValueError(
            f"threshold: got {threshold} for outputs without scores; pass what generate(…, "
            "return_dict_in_generate=True, output_scores=True) returned."
        )


__all__ = ["decode_ids", "id_rows", "read_answers"]
