# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The grammar of answers: what a token is, the one reader; the criterion for answers that go round in circles."""

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import StoppingCriteria

from .configuration import TokenRoles

SEPARATOR = "</c>"  # between the queries of a question
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
ANSWER_START = f"{TURN_START}assistant\n"

# What a token is to the grammar of answers: 0…1000 a coordinate, WORD and all below it words, the others marks.
WORD, REF, REF_END, BOX, BOX_END, IMAGE, TURN, TURN_STOP = range(-8, 0)
_GRAMMAR = {"<ref>": REF, "</ref>": REF_END, "<box>": BOX, "</box>": BOX_END}
_GRAMMAR.update({f"<{value}>": value for value in range(1001)})
KINDS = {**_GRAMMAR, "<img>": IMAGE, TURN_START: TURN, TURN_END: TURN_STOP}
# Special tokens that carry an answer: what a reader keeps when the others are skipped.
ANSWER_TOKENS = frozenset([*_GRAMMAR, SEPARATOR])


def read_boxes(kinds: Sequence[int], begin: int = 0) -> list[tuple[range | None, range]]:
    """The one reader of the answer grammar (docs/stock-behaviour.md §1, "Output grammar"), in linear time.

    kinds: what each token is. begin: the first to read; it reads up to the end of the turn. `<ref>…</ref>` labels what
    follows, up to the next; a label that is not closed ends where the next box begins. For each `<box>` with its
    `</box>` it returns the places of the label's words (None for no label) and of what is inside.
    """
    said: list[tuple[range | None, range]] = []
    label = opened = start = None
    for place in range(begin, len(kinds)):
        kind = kinds[place]
        if kind >= 0 or kind <= WORD:
            continue
        if kind == TURN_STOP:
            break
        if kind == BOX_END and start is not None:
            said.append((label, range(start, place)))
        elif kind in (BOX, REF_END) and opened is not None:
            label, opened = range(opened, place), None
        elif kind == REF:
            opened = place + 1
        start = place + 1 if kind == BOX else None
    return said


class DegenerateAnswerCriteria(StoppingCriteria):
    """Ends a row that repeats a box, cycles through boxes, or marches a sliver along an axis.

    Made by `model.degenerate_answer_criteria()`. In the drop-in's `generate` the answer keeps what came before the
    first repetition (of a march, its first box); elsewhere it ends with what is said, and `answer_to_keep` tells where
    to cut. What the row would have said after its repetitions is lost.

    Args:
        roles: the checkpoint's token roles.
        period: cycles of up to so many boxes, with their labels, are looked for.
        times: how often a box or cycle must have been said, 2 or more.
        tolerance: a box is that of the cycle before if no coordinate differs by more, in thousandths of the image's
            side, nor by more than a quarter of the box's side: small things in a row are not the same. A point may
            differ by 1. 0 for equal boxes only.
        march: slivers in a row that make a march, 3 or more: they touch or overlap, in equal steps, and are alike on
            the other axis. 0 for none.
        thin: how wide a sliver is at most, in thousandths of the image's side.
        prompt_length: tokens that are not the answer, where rows are not asked by the drop-in's `generate`.

    Raises:
        ValueError: a number that is not whole or too small. The message names it.
    """

    def __init__(
        self,
        roles: TokenRoles,
        *,
        period: int = 8,
        times: int = 3,
        tolerance: int = 3,
        march: int = 10,
        thin: int = 5,
        prompt_length: int = 0,
    ):
        least = {"period": 1, "times": 2, "tolerance": 0, "march": 3 if march else 0, "thin": 0, "prompt_length": 0}
        for name, value in zip(least, (period, times, tolerance, march, thin, prompt_length), strict=True):
            if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
                raise ValueError(f"{name}={value!r}: expected a whole number of {least[name]} or more.")
        self.period, self.times, self.tolerance = period, times, tolerance
        self.march, self.thin, self.prompt_length = march, thin, prompt_length
        self.box_end = roles.box_end
        self.kinds = {index: index - roles.coord_start for index in range(roles.coord_start, roles.coord_end + 1)}
        self.kinds.update({roles.ref_start: REF, roles.ref_end: REF_END, roles.box_start: BOX, roles.box_end: BOX_END})

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: `[rows, n]`. Returns `[rows]` bool, True for a row to end."""
        done = input_ids[:, -1] == self.box_end
        for row in done.nonzero().flatten().tolist():
            done[row] = self.answer_to_keep(input_ids[row, self.prompt_length :]) is not None
        return done

    def answer_to_keep(self, answer: Sequence[int] | torch.Tensor) -> int | None:
        """How many tokens of an answer to keep if its last token completes a repetition, else None."""
        ids = answer.tolist() if isinstance(answer, torch.Tensor) else answer
        if not ids or ids[-1] != self.box_end or not self._may_end(ids):
            return None
        kinds = [self.kinds.get(index, WORD - 1 - index) for index in ids]  # words by their ids
        places = read_boxes(kinds)[-max(self.period * self.times, self.march) :]
        said = [(label and kinds[label.start : label.stop], kinds[at.start : at.stop]) for label, at in places]
        for period in range(1, min(self.period, len(said) // self.times) + 1):
            first = len(said) - period * (self.times - 1)
            if all(self._same(said[place], said[place - period]) for place in range(first, len(said))):
                break
        else:
            first = len(said) - self.march + 1
            if not 0 < self.march <= len(said) or not self._marches(said[-self.march :]):
                return None
        label, inside = places[first]
        # a label right before it is said again, too
        return (inside if label is None or inside.start - label.stop > 2 else label).start - 1

    def _may_end(self, ids: Sequence[int]) -> bool:
        """Whether its last box is a sliver, or ends where one of those before it did: most do not, which costs little.

        Cycles of more than `32 * period` tokens are not seen.
        """
        back = [*ids[-32 * self.period :][::-1], 0, 0, 0, 0]
        y, x = back[1:3]
        if self.march and min(abs(x - back[4]), abs(y - back[3])) <= self.thin:
            return True
        end = 0
        with contextlib.suppress(ValueError):  # no more boxes
            for _ in range(self.period):
                end = back.index(self.box_end, end + 1)
                if abs(x - back[end + 2]) <= self.tolerance and abs(y - back[end + 1]) <= self.tolerance:
                    return True
        return False

    def _same(self, one: tuple[Any, list[int]], other: tuple[Any, list[int]]) -> bool:
        """Whether two (label, box or point) are the same, but for the tolerance."""
        (label, box), (other_label, other_box) = one, other
        if label != other_label or len(box) != len(other_box) or len(box) not in (2, 4) or min(*box, *other_box) < 0:
            return one == other
        room = (1, 1) if len(box) == 2 else (abs(box[2] - box[0]) // 4, abs(box[3] - box[1]) // 4) * 2
        return all(abs(a - b) <= min(most, self.tolerance) for a, b, most in zip(box, other_box, room, strict=True))

    def _marches(self, said: Sequence[tuple[Any, list[int]]]) -> bool:
        """Whether slivers of one label go along x or y in equal steps, side by side."""
        if any(label != said[0][0] or len(box) != 4 or min(box) < 0 for label, box in said):
            return False
        for axis in (0, 1):
            along = [sorted(box[axis::2]) for _, box in said]
            across = [sorted(box[1 - axis :: 2]) for _, box in said]
            widths = [stop - start for start, stop in along]
            steps = [after[0] - before[0] for before, after in pairwise(along)]
            alike = max(max(side) - min(side) for side in (*zip(*across, strict=True), widths, steps)) <= 1
            touching = 0 not in steps and max(map(abs, steps)) <= max(*widths, 1)
            if alike and touching and max(widths) <= self.thin:
                return True
        return False
