# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Pure decoding rules: logits → probabilities → six tokens → accepted tokens and the row's next phase.

No model, no loop, no state. Every rule is vectorised over rows and copies nothing between host and device. Sections
(§) are those of docs/stock-behaviour.md. `verify` is speculative decoding (Leviathan et al. 2023; Chen et al. 2023)
with the model's own windows as drafts.
"""

import functools
from enum import IntEnum
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from .configuration import WINDOW, TokenRoles

# Thresholds of §3, by case.
_EMPTY_BOX = (0.7, 0.2, 0.2, 0.1, 0.1)  # A: slots 0–4 of box, none, /box, null, null
_BOX_END = 0.2  # B: mass on /box, null and im_end in slot 5
_BOX_TOP = 4  # B: a coordinate among this many in each of slots 1–4
_LABEL_START = 0.6  # C: mass on <ref> in slot 0
_LABEL_TOP = 5  # C: a non-coordinate among this many in each of slots 1–5
_SURE = 0.9  # hybrid: a coordinate at least this probable is never ambiguous
_SPREAD = 60  # hybrid: candidates at most this far apart (thousandths) are not ambiguous
_NO_COORDINATE = 0  # hybrid: what an ambiguous coordinate becomes, so that §4's error rule fires


class Phase(IntEnum):
    """How a row's next tokens are accepted, and its accepted ones were (`accepted_by`)."""

    MTP = 0  # up to six at once, from a window
    AR = 1  # one, by next-token decoding
    VERIFIED = 2  # a draft as far as next-token decoding confirms it; the window behind it is the next draft


class Acceptance(NamedTuple):
    """What one step adds to each of R rows.

    tokens: `[R, 6]` long, or `[R, 11]` from `verify`, of which a row accepts the first `lengths` and keeps the next
    `drafted` as its draft. lengths: `[R]` long, 1…6. drafted: `[R]` long, 0…5. phase: `[R]` long, of the row's next
    step. finished: `[R]` bool.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    drafted: torch.Tensor
    phase: torch.Tensor
    finished: torch.Tensor


class StockTopPLogitsWarper(LogitsProcessor):
    """Nucleus filter of §3 step 3: drops every token whose *preceding* mass exceeds `top_p`.

    transformers' `TopPLogitsWarper` sums from the tail and compares with `1 - top_p`, which rounds differently and
    drops a token whose preceding mass equals `top_p`; the stock keeps it.
    """

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ordered, order = scores.sort(dim=-1, descending=True)
        mass = ordered.softmax(dim=-1).cumsum(dim=-1)
        dropped = torch.zeros_like(mass, dtype=torch.bool)
        dropped[..., 1:] = mass[..., :-1] > self.top_p
        return scores.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


def stock_warpers(
    repetition_penalty: float,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    between: LogitsProcessorList | None = None,
) -> LogitsProcessorList:
    """Steps 1–4 of §3, in the stock's order: `(input_ids [N, n], scores [N, V] float32) -> scores`.

    Args:
        repetition_penalty: 1.0 is none. temperature: 0 is greedy. top_p, top_k: None is none; both also apply to a
            greedy row, whose thresholds they change.
        between: a user's processors, run after the penalty and before the warpers, as transformers' generate does.
    """
    warpers = LogitsProcessorList()
    if repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    warpers.extend(between or [])
    if temperature > 0 and temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_p is not None and top_p < 1:
        warpers.append(StockTopPLogitsWarper(top_p))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    return warpers


def draw(noise: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """One draw per distribution, `[..., V] -> [...]` long, by exponential noise of the same shape.

    Where p / noise is largest is distributed as p, and it is how `torch.multinomial` draws: with noise of the same
    generator, these are the numbers `Categorical(probs=p).sample()` gives. Written out because Categorical takes no
    generator, because `multinomial` asks the device whether it got probabilities and refuses a whole batch for one
    row of NaN, and because two distributions that are alike mostly agree under one noise. Of NaN, it is any id.
    """
    normalised = probabilities / probabilities.sum(-1, keepdim=True)
    return normalised.div_(noise).argmax(-1)


def window_tokens(
    probabilities: torch.Tensor, candidates: torch.Tensor, hybrid: torch.Tensor, roles: TokenRoles
) -> torch.Tensor:
    """Six tokens, `[R, 6]` long, from six distributions: the first of §3's cases A, B, C, D that holds.

    Args:
        probabilities: `[R, 6, V]` float32. candidates: `[R, 6]` long, case D's tokens (argmax or draw).
        hybrid: `[R]` bool, rows in which ambiguous coordinates are voided.
    """
    empty, holds_empty = _empty_box(probabilities, roles)
    box, holds_box = _box(probabilities, hybrid, roles)
    label, holds_label = _label(probabilities, roles)
    tokens = torch.where(holds_label[:, None], label, candidates)
    tokens = torch.where(holds_box[:, None], box, tokens)
    return torch.where(holds_empty[:, None], empty, tokens)


def _empty_box(p: torch.Tensor, roles: TokenRoles) -> tuple[torch.Tensor, torch.Tensor]:
    """Case A: `[6]` tokens and `[R]` whether it holds."""
    box, none, end, null3, null4 = _EMPTY_BOX
    holds = (
        (p[:, 0, roles.box_start] >= box)
        & (p[:, 1, roles.none] > none)
        & (p[:, 2, roles.box_end] > end)
        & (p[:, 3, roles.null] > null3)
        & (p[:, 4, roles.null] > null4)
    )
    tokens = (roles.box_start, roles.none, roles.box_end, roles.null, roles.null, roles.null)
    return _constant(tokens, p.device), holds


@functools.cache
def _constant(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Copied to the device once, not at every step, and kept: graphs hold its address."""
    return torch.tensor(values, device=device)


def _box(p: torch.Tensor, hybrid: torch.Tensor, roles: TokenRoles) -> tuple[torch.Tensor, torch.Tensor]:
    """Case B: `[R, 6]` tokens and `[R]` whether it holds."""
    ends = p[:, 5, roles.box_end] + p[:, 5, roles.null] + p[:, 5, roles.end] >= _BOX_END
    top_p, top_ids = p[:, 1:5].topk(_BOX_TOP, dim=-1)  # [R, 4, 4], most probable first
    coordinate = _is_coordinate(top_ids, roles)
    first = coordinate.int().argmax(-1, keepdim=True)  # the most probable coordinate of a slot
    chosen = top_ids.gather(-1, first).squeeze(-1)

    highest = top_ids.masked_fill(~coordinate, -1).amax(-1)
    lowest = top_ids.masked_fill(~coordinate, torch.iinfo(top_ids.dtype).max).amin(-1)
    unsure = top_p.gather(-1, first).squeeze(-1) < _SURE
    ambiguous = hybrid[:, None] & unsure & (coordinate.sum(-1) >= 2) & (highest - lowest > _SPREAD)
    chosen = chosen.masked_fill(ambiguous, _NO_COORDINATE)

    tokens = F.pad(F.pad(chosen, (1, 0), value=roles.box_start), (0, 1), value=roles.box_end)
    return tokens, ends & coordinate.any(-1).all(-1)


def _label(p: torch.Tensor, roles: TokenRoles) -> tuple[torch.Tensor, torch.Tensor]:
    """Case C: `[R, 6]` tokens and `[R]` whether it holds."""
    top_ids = p[:, 1:].topk(_LABEL_TOP, dim=-1).indices  # [R, 5, 5]
    word = ~_is_coordinate(top_ids, roles)
    chosen = top_ids.gather(-1, word.int().argmax(-1, keepdim=True)).squeeze(-1)
    tokens = F.pad(chosen, (1, 0), value=roles.ref_start)
    return tokens, (p[:, 0, roles.ref_start] >= _LABEL_START) & word.any(-1).all(-1)


def accept_window(tokens: torch.Tensor, hybrid: torch.Tensor, roles: TokenRoles) -> Acceptance:
    """What of a window's six tokens is accepted: the first line of §4's table that matches.

    Args:
        tokens: `[R, 6]` long. hybrid: `[R]` bool; the other rows decode in `fast`.
    """
    first = tokens[:, 0]
    coordinate = _is_coordinate(tokens, roles)
    leading = coordinate[:, 1:5].long().cumprod(-1).sum(-1)  # coordinates right after the first token, 0…4

    ends = (first == roles.null) | (first == roles.end)
    box = first == roles.box_start
    nothing = box & (tokens[:, 1] == roles.none)
    whole = box & (leading == 4) & (tokens[:, 5] == roles.box_end)
    point = box & (leading == 2) & (tokens[:, 3] == roles.box_end)
    broken = box & ~nothing & ~whole & ~point

    before_null = (tokens != roles.null).long().cumprod(-1).sum(-1)
    last_two = tokens.gather(1, (before_null[:, None] - 2 + torch.arange(2, device=tokens.device)).clamp(min=0))
    twice_closed = (before_null >= 2) & (last_two == roles.ref_end).all(-1)
    count = before_null - twice_closed.long()
    count = torch.where(broken, torch.where(hybrid, 1 + leading, WINDOW), count)
    count = count.masked_fill(point, 4).masked_fill(whole, WINDOW).masked_fill(nothing, 3).masked_fill(ends, 1)

    accepted = tokens.clone()
    accepted[:, 0] = first.masked_fill(ends, roles.end)
    accepted[:, 2] = tokens[:, 2].masked_fill(nothing, roles.box_end)
    phase = torch.where(broken & hybrid, Phase.AR, Phase.MTP)
    return Acceptance(accepted, count, torch.zeros_like(count), phase, ends)


def accept_next(token: torch.Tensor, hybrid: torch.Tensor, roles: TokenRoles) -> Acceptance:
    """What follows one autoregressive token (§5).

    Args:
        token: `[R]` long, accepted whatever it is. hybrid: `[R]` bool; the other rows decode in `slow`.
    """
    closes = token == roles.box_end
    inside = _is_coordinate(token, roles) | (token == roles.none)
    finished = torch.where(hybrid, ~closes & ~inside, token == roles.end)
    phase = torch.where(hybrid & closes, Phase.MTP, Phase.AR)
    return Acceptance(token[:, None], torch.ones_like(token), torch.zeros_like(token), phase, finished)


def accept_either(
    probabilities: torch.Tensor, tokens: torch.Tensor, alone: torch.Tensor, hybrid: torch.Tensor, roles: TokenRoles
) -> Acceptance:
    """`accept_next` where a row is `alone`, `[R]` bool, else `accept_window`: both on all rows, so that nobody has to
    ask the device which is which.

    Args:
        probabilities: `[R, 6, V]` float32. tokens: `[R, 6]` long, their argmax. Of rows that are alone, the first
            counts.
    """
    window = accept_window(window_tokens(probabilities, tokens, hybrid, roles), hybrid, roles)
    following = accept_next(tokens[:, 0], hybrid, roles)._replace(tokens=tokens)
    rules = zip(following, window, strict=True)
    return Acceptance(*(torch.where(alone if one.dim() == 1 else alone[:, None], one, other) for one, other in rules))


def verify(
    chosen: torch.Tensor,
    draft: torch.Tensor,
    drafted: torch.Tensor,
    window: torch.Tensor,
    most: torch.Tensor,
    roles: TokenRoles,
) -> Acceptance:
    """Keeps what next-token decoding would have said: the draft as far as it agrees, and one token more.

    If all of a draft holds and the window behind it begins as next-token decoding goes on, the rest of that window, up
    to its first null, is the next draft. If a part of a draft falls, what is left behind it stays a draft: of a box
    whose x is one off, the rest is mostly right. Of that rest, the first coordinate is said anew: next-token decoding
    has seen the draft before it, which is mostly nearly right.

    Args:
        chosen: `[R, P]` long, next-token decoding's choice behind the last committed token and behind each token of
            the draft, P ≤ 6. Columns after a row's `drafted` may hold anything.
        draft: `[R, P - 1]` long, of which the first `drafted`, `[R]` long, count.
        window: `[R, 6]` long, the rules' tokens for the window behind the draft.
        most: `[R]` long. Of a row that would accept more, the rest is taken back; it goes on without a draft.

    Returns:
        Tokens `[R, 11]`; rows are finished where an end is accepted, the others go on verifying.
    """
    width = chosen.shape[1]
    column = torch.arange(2 * WINDOW - 1, device=chosen.device)
    agrees = (draft == chosen[:, :-1]) & (column[: width - 1] < drafted[:, None])
    held = agrees.long().cumprod(-1).sum(-1)  # tokens of the draft
    whole = held == drafted

    # all of it held: behind the chosen tokens comes the window, of which the first token is chosen already
    following = chosen.gather(1, held[:, None]).squeeze(1) == window[:, 0]
    place = column - held[:, None]
    extended = window.gather(1, place.clamp(0, WINDOW - 1))
    # behind an end or a null, a window says nothing
    speaks = (window[:, :-1] != roles.end) & (window[:, 1:] != roles.null)
    in_window = torch.where(following, speaks.long().cumprod(-1).sum(-1), 0)

    # a part of it fell: behind the chosen tokens comes the rest of the draft
    chosen, draft = F.pad(chosen, (0, len(column) - width)), F.pad(draft, (0, len(column) - width + 1))
    anew = (place == 1) & _is_coordinate(draft, roles) & _is_coordinate(chosen, roles)
    rest = torch.where(anew, chosen, draft)

    tokens = torch.where(place <= 0, chosen, torch.where(whole[:, None], extended, rest))
    ends = (tokens == roles.end) & (place <= 0)
    lengths = torch.where(ends.any(-1), ends.long().argmax(-1), held) + 1
    cut = lengths > most
    finished = ends.any(-1) & ~cut
    drafted = torch.where(whole, in_window, drafted - held - 1).masked_fill(finished | cut, 0)
    return Acceptance(tokens, lengths.minimum(most), drafted, torch.full_like(lengths, Phase.VERIFIED), finished)


def verify_label(accepted: Acceptance, wanted: torch.Tensor, roles: TokenRoles) -> Acceptance:
    """Cuts what `accept_window` gave behind the first `<ref>` of rows that are `wanted`, `[R]` bool, to have their
    labels verified: what the window said there becomes a draft."""
    opened, length = _behind(roles.ref_start, accepted, wanted & ~accepted.finished)
    phase = accepted.phase.masked_fill(opened, Phase.VERIFIED)
    return accepted._replace(lengths=length, drafted=accepted.lengths - length, phase=phase)


def leave_label(accepted: Acceptance, only_labels: torch.Tensor, roles: TokenRoles) -> Acceptance:
    """Cuts what `verify` gave behind the first `</ref>` of rows of which `only_labels`, `[R]` bool, are verified: they
    go on with windows."""
    closed, length = _behind(roles.ref_end, accepted, only_labels)
    return accepted._replace(
        lengths=length,
        drafted=accepted.drafted.masked_fill(closed, 0),
        phase=accepted.phase.masked_fill(closed, Phase.MTP),
        finished=accepted.finished & ~closed,
    )


def _behind(token: int, accepted: Acceptance, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of `rows`, `[R]` bool, accept the token, and `[R]` the lengths of rows cut behind it."""
    column = torch.arange(accepted.tokens.shape[1], device=rows.device)
    there = (accepted.tokens == token) & (column < accepted.lengths[:, None])
    found = rows & there.any(-1)
    return found, torch.where(found, there.long().argmax(-1) + 1, accepted.lengths)


def _is_coordinate(ids: torch.Tensor, roles: TokenRoles) -> torch.Tensor:
    return (ids >= roles.coord_start) & (ids <= roles.coord_end)
