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
    """A whole box, point or "nothing found" of an answer. start: the place of its first token, its label's if that is
    said again. label: ids. coordinates: thousandths, as they were said; none for "nothing found"."""

    start: int
    label: tuple[int, ...]
    coordinates: tuple[int, ...]


class DegenerateAnswerCriteria(StoppingCriteria):
    """Ends a row that repeats a box, cycles through boxes, or marches a thin box along an axis.

    Made by `model.degenerate_answer_criteria()`. In the drop-in's `generate` the answer keeps what came before the
    first repetition (of a march, its first box); elsewhere it ends with what is said, and `kept` tells where to cut.

    Args:
        roles: the checkpoint's token roles.
        period: cycles of up to so many boxes are looked for; 1 finds only one box repeated at once.
        times: how often a box or cycle must have been said, 2 or more.
        march: boxes in a row that make a march: thin, side by side on one axis, all alike but for that; 0 for none.
        thin: the width of a thin box, in thousandths of the image's side.
        prompt_length: tokens that are not the answer, where rows are not asked by the drop-in's `generate`.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        roles: TokenRoles,
        *,
        period: int = 8,
        times: int = 2,
        march: int = 8,
        thin: int = 20,
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
        done = [self.kept(ids[self.prompt_length :]) is not None for ids in input_ids.tolist()]
        return torch.tensor(done, device=input_ids.device)

    def kept(self, answer: Sequence[int]) -> int | None:
        """How many tokens of an answer to keep if its last token completes a repetition, else None."""
        if not answer or answer[-1] != self.roles.box_end:
            return None
        said = read_boxes(answer, self.roles, most=max(self.period * self.times, self.march))
        for period in range(1, min(self.period, len(said) // self.times) + 1):
            last = [(one.label, one.coordinates) for one in said[-period * self.times :]]
            if all(last[i] == last[i - period] for i in range(period, len(last))):
                return said[len(said) - period * (self.times - 1)].start
        if self.march and len(said) >= self.march and self.marches(said[-self.march :]):
            return said[len(said) - self.march + 1].start
        return None

    def marches(self, boxes: Sequence[Said]) -> bool:
        """Whether boxes of one label go along x or y in equal steps, each thin there and alike on the other axis."""
        if any(len(box.coordinates) != 4 or box.label != boxes[0].label for box in boxes):
            return False
        for axis in (0, 1):
            starts = [box.coordinates[axis] for box in boxes]
            widths = [box.coordinates[axis + 2] - box.coordinates[axis] for box in boxes]
            across = {(box.coordinates[1 - axis], box.coordinates[3 - axis]) for box in boxes}
            steps = [after - before for before, after in pairwise(starts)]
            alike = len(across) == 1 and max(widths) - min(widths) <= 1 and max(steps) - min(steps) <= 1
            lengths = [*widths, *map(abs, steps)]
            if alike and min(widths) >= 0 and 0 not in steps and max(lengths) <= self.thin:
                return True
        return False


def read_boxes(answer: Sequence[int], roles: TokenRoles, most: int) -> list[Said]:
    """The last `most` well-formed boxes, points and "nothing found" of an answer's ids, in order.

    What lies between two of them, but for a label, parts them: nothing before it is read.
    """
    said: list[Said] = []
    end = len(answer)
    while len(said) < most and end > 0 and answer[end - 1] == roles.box_end:
        start = _opening(answer, end, roles.box_start, least=max(0, end - 6))
        if start is None:
            break
        inside = answer[start + 1 : end - 1]
        coordinates = tuple(token - roles.coord_start for token in inside)
        well_formed = len(inside) in (2, 4) and all(0 <= c <= roles.coord_end - roles.coord_start for c in coordinates)
        if not well_formed and list(inside) != [roles.none]:
            break
        begin = start
        if start and answer[start - 1] == roles.ref_end:
            opening = _opening(answer, start, roles.ref_start, least=0)
            begin = start if opening is None else opening
        said.append(Said(begin, tuple(answer[begin:start]), coordinates if well_formed else ()))
        end = begin
    said.reverse()
    # a box without a label of its own has that of the box before it
    label: tuple[int, ...] | None = None
    named = []
    for one in said:
        label = one.label or label
        named.append(one._replace(label=label or ()))
    return named


def _opening(answer: Sequence[int], end: int, token: int, least: int) -> int | None:
    """Where `token` stands last before `end`, but not before `least`."""
    return next((place for place in range(end - 1, least - 1, -1) if answer[place] == token), None)


__all__ = ["DegenerateAnswerCriteria", "Said", "read_boxes"]
