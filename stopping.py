# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""When an answer goes round in circles: greedy decoding of dense scenes can repeat one box until the length limit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria

from .configuration import TokenRoles


class Said(NamedTuple):
    """A box, point, "nothing found" or anything else between `<box>` and `</box>`.

    start: the place of its first token, or of its label's if that is said again. label, inside: ids.
    """

    start: int
    label: tuple[int, ...]
    inside: tuple[int, ...]


class DegenerateAnswerCriteria(StoppingCriteria):
    """Ends a row that repeats a box, cycles through boxes, or marches a sliver along an axis.

    Made by `model.degenerate_answer_criteria()`. In the drop-in's `generate` the answer keeps what came before the
    first repetition (of a march, its first box); elsewhere it ends with what is said, and `answer_to_keep` tells where
    to cut. What the row would have said after its repetitions is lost.

    Args:
        roles: the checkpoint's token roles.
        period: cycles of up to so many boxes are looked for; 1 finds only one box repeated at once. Boxes are the same
            if their labels are too; a label said more than `period * times` boxes ago is not known any more.
        times: how often a box or cycle must have been said, 2 or more.
        march: slivers in a row that make a march: they touch or overlap, in equal steps, and are alike on the other
            axis; 0 for none.
        thin: how wide a sliver is at most, in thousandths of the image's side.
        prompt_length: tokens that are not the answer, where rows are not asked by the drop-in's `generate`.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        roles: TokenRoles,
        *,
        period: int = 8,
        times: int = 3,
        march: int = 10,
        thin: int = 5,
        prompt_length: int = 0,
    ):
        for name, value, least in (
            ("period", period, 1),
            ("times", times, 2),
            ("march", march, 0),
            ("thin", thin, 0),
            ("prompt_length", prompt_length, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number of {least} or more.")
        if 0 < march < 3:
            raise ValueError(f"march={march}: two boxes are no march; expected 0 for none, or 3 or more.")
        self.roles, self.period, self.times, self.march, self.thin = roles, period, times, march, thin
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """input_ids: `[rows, n]`. Returns `[rows]` bool, True for a row to end."""
        done = [self.answer_to_keep(ids[self.prompt_length :]) is not None for ids in input_ids.tolist()]
        return torch.tensor(done, device=input_ids.device)

    def answer_to_keep(self, answer: Sequence[int]) -> int | None:
        """How many tokens of an answer to keep if its last token completes a repetition, else None."""
        if not answer or answer[-1] != self.roles.box_end:
            return None
        said = read_boxes(answer, self.roles, most=max(self.period * self.times, self.march))
        for period in range(1, min(self.period, len(said) // self.times) + 1):
            last = [(one.label, one.inside) for one in said[-period * self.times :]]
            if all(last[i] == last[i - period] for i in range(period, len(last))):
                return said[len(said) - period * (self.times - 1)].start
        if self.march and len(said) >= self.march and self.marches(said[-self.march :]):
            return said[len(said) - self.march + 1].start
        return None

    def marches(self, said: Sequence[Said]) -> bool:
        """Whether slivers of one label go along x or y in equal steps, side by side."""
        low, high = self.roles.coord_start, self.roles.coord_end
        if any(len(one.inside) != 4 or one.label != said[0].label for one in said):
            return False
        if not all(low <= token <= high for one in said for token in one.inside):
            return False
        for axis in (0, 1):
            along = [sorted(one.inside[axis::2]) for one in said]
            across = [sorted(one.inside[1 - axis :: 2]) for one in said]
            widths = [stop - start for start, stop in along]
            steps = [after[0] - before[0] for before, after in pairwise(along)]
            alike = max(_spread(side) for side in (*zip(*across, strict=True), widths, steps)) <= 1
            touching = 0 not in steps and max(map(abs, steps)) <= max(*widths, 1)
            if alike and touching and max(widths) <= self.thin:
                return True
        return False


def read_boxes(answer: Sequence[int], roles: TokenRoles, most: int) -> list[Said]:
    """The last `most` of what an answer's ids say between `<box>` and `</box>`, in order.

    Text between boxes is passed over, but for labels: a box has the label before it, () if that is too far away.
    """
    found: list[Said] = []
    place, end, label_end = len(answer), None, None
    unnamed = 0  # boxes found, from the last one back, that wait for their label
    while place > 0:
        place -= 1
        token = answer[place]
        if token == roles.box_end:
            if len(found) == most:
                break
            end, label_end = place, None
        elif token == roles.box_start and end is not None:
            found.append(Said(place, (), tuple(answer[place + 1 : end])))
            end = None
        elif token == roles.ref_end:
            end, label_end = None, place
        elif token == roles.ref_start and label_end is not None:
            words = tuple(answer[place + 1 : label_end])
            found[unnamed:] = [one._replace(label=words) for one in found[unnamed:]]
            if unnamed < len(found) and answer[label_end + 1] == roles.box_start:
                found[-1] = found[-1]._replace(start=place)
            unnamed, label_end = len(found), None
    found.reverse()
    return found


def _spread(values: Sequence[int]) -> int:
    return max(values) - min(values)


__all__ = ["DegenerateAnswerCriteria", "Said", "read_boxes"]
