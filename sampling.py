# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Logits → probabilities → tokens, for rows with different sampling parameters: docs/stock-behaviour.md §3."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import LogitsProcessorList

from .decoding import draw, stock_warpers

# Whose fault it is that a row has no probabilities: its processors made its logits NaN or infinite; they were so.
PROCESSORS, MODEL = 1, 2


@dataclass(frozen=True)
class SamplingParameters:
    """How a row's logits become probabilities. Rows with equal ones are processed together."""

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    @property
    def samples(self) -> bool:
        return self.temperature > 0


class CheckedProcessor:
    """A processor of the caller's, whose answer must be scores like those it got: others would be broadcast."""

    def __init__(self, processor: Callable[..., Any], row: int):
        self.processor, self.row = processor, row

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        processed = self.processor(input_ids, scores)
        if not isinstance(processed, torch.Tensor):
            got = type(processed).__name__
        elif processed.shape == scores.shape and processed.is_floating_point():
            return processed.to(scores)
        else:
            got = f"{processed.dtype} {list(processed.shape)}"
        raise ValueError(
            f"row {self.row}: the logits processor {type(self.processor).__name__} returned {got}; expected "
            f"{scores.dtype} {list(scores.shape)}, as the scores it got."
        )


class Sampler:
    """Chooses tokens for rows (generation.py's) that are in one phase.

    Logits are float32. `slots` is `[R]` long, of the rows, which come such that those of one `kind` lie side by side:
    they are processed together. Faults are long: 0, `PROCESSORS` or `MODEL`.

    Args:
        tokens: `[slots, capacity]` long, each row's committed tokens and draft; behind them its first token repeated.
        committed: `[slots]` long, how many tokens of a row are.
        ends: ids that a row must not take before its least length, beside its stops: the end of turn and null.
        generator: draws for every row that has none of its own; None is the global one.
    """

    def __init__(
        self, tokens: torch.Tensor, committed: torch.Tensor, ends: list[int], generator: torch.Generator | None
    ):
        self.tokens, self.committed, self.ends, self.generator = tokens, committed, ends, generator

    @staticmethod
    def kind(row: Any) -> tuple:
        """Rows whose logits go through the same; one with processors of the caller's is alone."""
        sampling = row.settings.sampling
        return sampling.samples, sampling, id(row) if row.processors else None

    def choose(
        self, logits: torch.Tensor, rows: list[Any], slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For windows and AR steps: every line has a row's committed tokens behind it.

        Args:
            logits: `[R, width, V]`, width 6 or 1. In a window only the first token can end a row.

        Returns:
            probabilities `[R, width, V]`, tokens `[R, width]` (argmax, or a draw where the row samples), faults `[R]`.
        """
        probabilities, faults = self.probabilities(logits, rows, slots)
        tokens = probabilities.argmax(-1)
        drawing = [place for place, row in enumerate(rows) if row.settings.sampling.samples]
        if drawing:
            side_by_side = slice(drawing[0], drawing[-1] + 1)
            noise = torch.empty_like(probabilities[side_by_side])
            if any(rows[place].generator for place in drawing):
                for own, place in zip(noise, drawing, strict=True):
                    own.exponential_(generator=rows[place].generator or self.generator)
            else:
                noise.exponential_(generator=self.generator)
            tokens[side_by_side] = draw(noise, probabilities[side_by_side])
        return probabilities, tokens, faults.amax(-1)

    def choose_verified(
        self, causal: torch.Tensor, window: torch.Tensor, rows: list[Any], slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """For rows that verify a draft: next-token decoding behind each token of it, and the window behind it all.

        A row that samples draws every position with noise of that position's own, the very noise that mode "slow"
        would draw it with, and the window's draws use it too. A token is therefore what "slow" would draw, whatever
        the draft: the draft only decides in which forward it is drawn, and mostly agrees with it.

        Args:
            causal: `[R, P, V]`, line j behind the committed tokens and j of the draft. Lines after a row's draft may
                hold anything. window: `[R, 6, V]`.

        Returns:
            probabilities `[R, P, V]`, tokens `[R, P]` and faults `[R, P]` of next-token decoding, and probabilities
            and tokens of the window, for which any draft may come.
        """
        causal, faults = self.probabilities(causal, rows, slots, line_by_line=True)
        window, _ = self.probabilities(window, rows, slots, draft=True)
        chosen, drafted = causal.argmax(-1), window.argmax(-1)
        for place, row in enumerate(rows):
            if row.settings.sampling.samples:
                own = len(row.draft) + 1
                noise = self.noise(row, own - 1 + window.shape[1], causal)
                chosen[place, :own] = draw(noise[:own], causal[place, :own])
                drafted[place] = draw(noise[own - 1 :], window[place])
        return causal, chosen, faults, window, drafted

    # ---- noise, and taking it back

    def noise(self, row: Any, positions: int, like: torch.Tensor) -> torch.Tensor:
        """`[positions, V]` exponential noise of the row's next tokens; what no token has used yet stays with the row.

        Drawn position by position, so that a generator gives what it would give next-token decoding.
        """
        while len(row.noise) < positions:
            fresh = torch.empty(1, like.shape[-1], device=like.device)
            fresh.exponential_(generator=row.generator or self.generator)
            row.noise.append((fresh, row.generator and row.generator.get_state()))
        return torch.cat([fresh for fresh, _ in row.noise[:positions]])

    def rewinder(self, rows: list[Any]) -> Callable[[], None]:
        """Takes back what these rows will have drawn from now on, so that they draw it again."""
        drawing = [(row, list(row.noise)) for row in rows if row.settings.sampling.samples]
        generators = {row.generator or self.generator for row, _ in drawing}
        states = [(one, one.get_state()) for one in generators if one is not None]

        def rewind() -> None:
            for generator, state in states:
                generator.set_state(state)
            for row, noise in drawing:
                row.noise = noise

        return rewind

    # ---- logits to probabilities

    def probabilities(
        self, logits: torch.Tensor, rows: list[Any], slots: torch.Tensor, *, line_by_line=False, draft=False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[R, width, V]` logits → probabilities, and faults `[R, width]`.

        Args:
            line_by_line: line j has j tokens of the row's draft behind it, as next-token decoding would have them;
                otherwise each line has all there are. draft: only a draft, the caller's processors are left out.
        """
        parts, faults, start = [], [], 0
        for _, members in groupby(rows, self.kind):
            some = list(members)
            part, at = (each[start : start + len(some)] for each in (logits, slots))
            start, unsound = start + len(some), None
            if not draft:
                self.hold_back(part, some, part.shape[1] if line_by_line else 1)
            if some[0].processors and not draft:
                unsound = ~part.amax(-1).isfinite()  # which processors could hide, or do themselves
                part = self.processed(part, some[0], at, line_by_line)
            elif warpers := stock_warpers(**vars(some[0].settings.sampling)):
                behind = self.behind(some, at, part.shape[1], line_by_line)
                part = warpers(behind, part.flatten(0, 1)).view(part.shape)
            part = part.softmax(-1)
            parts.append(part)
            # one NaN, one +inf or nothing but -inf in a line makes every probability of it NaN, so the first tells
            broken = part[..., 0].isnan()
            faults.append(broken * MODEL if unsound is None else (broken * PROCESSORS).masked_fill(unsound, MODEL))
        return (parts[0], faults[0]) if len(parts) == 1 else (torch.cat(parts), torch.cat(faults))

    def behind(self, rows: list[Any], slots: torch.Tensor, width: int, line_by_line: bool) -> torch.Tensor:
        """`[R * width, n]` the tokens behind each line, its row's first token repeated behind them."""
        ids = self.tokens[slots, : max(row.committed + len(row.draft) for row in rows)]
        if not line_by_line:
            return ids.repeat_interleave(width, 0)
        lengths = self.committed[slots, None] + torch.arange(width, device=ids.device)
        place = torch.arange(ids.shape[1], device=ids.device)
        return torch.where(place < lengths[..., None], ids[:, None], ids[:, None, :1]).flatten(0, 1)

    def processed(self, logits: torch.Tensor, row: Any, slot: torch.Tensor, line_by_line: bool) -> torch.Tensor:
        """Logits `[1, width, V]` of a row with processors of the caller's own, which see exactly its tokens. What one
        raises ends its row, not the step."""
        try:
            return self._processed(logits, row, slot, line_by_line)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            row.raised = error
            return logits

    def _processed(self, logits: torch.Tensor, row: Any, slot: torch.Tensor, line_by_line: bool) -> torch.Tensor:
        checked = LogitsProcessorList([CheckedProcessor(each, row.index) for each in row.processors])
        warpers = stock_warpers(**vars(row.settings.sampling), between=checked)
        ids = self.tokens[slot, : row.committed + len(row.draft)]  # a copy: processors may write into it
        if not line_by_line:
            return warpers(ids.repeat(logits.shape[1], 1), logits[0])[None]
        # as far as the draft holds, so that they are asked what next-token decoding would ask them, and no more
        lines: list[torch.Tensor] = []
        while not lines or (len(lines) <= len(row.draft) and self.holds(row, lines)):
            line = len(lines)
            lines.append(warpers(ids[:, : row.committed + line].clone(), logits[0, line : line + 1]))
        return torch.cat([*lines, logits[0, len(lines) :]])[None]

    def holds(self, row: Any, lines: list[torch.Tensor]) -> bool:
        """Whether the draft's next token is the one that the last of these lines `[1, V]` gives, and no end."""
        probabilities = lines[-1].softmax(-1)
        token = probabilities.argmax(-1)
        if row.settings.sampling.samples:
            token = draw(self.noise(row, len(lines), probabilities)[-1:], probabilities)
        # a null ends windows only
        return int(token) == row.draft[len(lines) - 1] and int(token) not in (self.ends[0], *row.settings.stops)

    def hold_back(self, logits: torch.Tensor, rows: list[Any], lines: int) -> None:
        """Forbids the end in the first `lines` lines of rows that are to grow longer."""
        for place, row in enumerate(rows):
            short = row.settings.least - row.committed
            if short > 0:
                logits[place, : min(lines, short), [*self.ends, *row.settings.stops]] = float("-inf")
