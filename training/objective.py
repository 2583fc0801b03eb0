# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The objective as pure functions: ids of a conversation → blocks → sequence, positions, targets, who sees whom.

A sample is its conversation under causal attention, with next-token targets, and behind it one window of six for each
block of the answers. A window repeats the token before its block (the anchor), holds five mask tokens, sees what comes
before the anchor and itself in both directions, and has the block as its targets: `generate`'s own step
(docs/finetuning.md, "The objective").
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from configuration import WINDOW

IGNORED = -100  # as target: nothing is to be predicted here


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens that the objective knows. opening: those of `<|im_start|>assistant\\n`."""

    opening: tuple[int, ...]
    end: int
    box_end: int
    ref_end: int
    null: int
    mask: int
    coord_start: int
    coord_end: int

    @classmethod
    def of(cls, tokenizer: Any) -> "Marks":
        names = ("<|im_end|>", "</box>", "</ref>", "<null>", "<text_mask>", "<0>", "<1000>")
        ids = tokenizer.get_added_vocab()
        if missing := [name for name in names if name not in ids]:
            raise ValueError(f"tokenizer: has no {', '.join(missing)}; expected LocateAnything's.")
        opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        return cls(tuple(opening), *(ids[name] for name in names))


@dataclass(frozen=True)
class Sample:
    """ids, positions, targets: of the causal part, `length` tokens, and of a window for each anchor behind it; targets
    are aligned: what the place itself predicts."""

    ids: list[int]
    positions: list[int]
    targets: list[int]
    length: int
    anchors: list[int]


def answers(ids: Sequence[int], marks: Marks) -> Iterator[tuple[int, int]]:
    """(a, e) of each answer that has its end mark: the place before its first token, and that of the end mark."""
    width = len(marks.opening)
    for start in range(len(ids) - width):
        if tuple(ids[start : start + width]) == marks.opening:
            before = start + width - 1
            end = next((place for place in range(before + 1, len(ids)) if ids[place] == marks.end), None)
            if end is not None:
                yield before, end


def blocks(ids: Sequence[int], marks: Marks, rng: random.Random) -> Iterator[tuple[int, list[int]]]:
    """(anchor, six targets) of each block. rng: for where the blocks of plain chat begin."""
    grounded = marks.box_end in ids or marks.ref_end in ids
    for anchor, end in answers(ids, marks):
        if not grounded:
            count, left = divmod(end - anchor, WINDOW)
            anchor += rng.randint(0, left)
            for place in range(anchor, anchor + count * WINDOW, WINDOW):
                yield place, list(ids[place + 1 : place + 1 + WINDOW])
            continue
        while anchor < end:
            block = list(ids[anchor + 1 : min(anchor + WINDOW, end - 1) + 1]) or [marks.end]
            closed = [place for place, token in enumerate(block) if token in (marks.ref_end, marks.box_end)]
            block = block[: closed[0] + 1 if closed else WINDOW]
            yield anchor, block + [marks.null] * (WINDOW - len(block))
            anchor += len(block)


def sample_of(ids: Sequence[int], marks: Marks, windows: bool = True) -> Sample | None:
    """The training sequence of a conversation, the same each time; None if nothing in it is to be learnt."""
    targets = [IGNORED] * len(ids)
    for before, end in answers(ids, marks):
        targets[before:end] = ids[before + 1 : end + 1]
    if not any(target != IGNORED for target in targets):
        return None
    whole, positions, anchors = list(ids), list(range(len(ids))), []
    for anchor, block in blocks(ids, marks, random.Random(repr(list(ids)))) if windows else ():
        anchors.append(anchor)
        whole += [ids[anchor]] + [marks.mask] * (WINDOW - 1)
        positions += range(anchor, anchor + WINDOW)
        targets += block
    return Sample(whole, positions, targets, len(ids), anchors)


def places_of(samples: Sequence[Sample]) -> torch.Tensor:
    """`[4, T]` long of samples side by side: of each place its sample, its window (-1 in the causal part), its index
    in the sample, and how many of the sample's first places it sees of the causal part."""
    columns: list[tuple[int, int, int, int]] = []
    for number, sample in enumerate(samples):
        columns += [(number, -1, place, place + 1) for place in range(sample.length)]
        slots = [(window, anchor) for window, anchor in enumerate(sample.anchors) for _ in range(WINDOW)]
        columns += [(number, window, sample.length + slot, seen) for slot, (window, seen) in enumerate(slots)]
    return torch.tensor(columns).T


def sees(query: Any, key: Any) -> torch.Tensor:
    """Whether a query sees a key, both columns of `places_of`: a causal key before its prefix, or its own window."""
    causal = (key[1] < 0) & (key[2] < query[3])
    return (query[0] == key[0]) & (causal | ((query[1] >= 0) & (query[1] == key[1])))
