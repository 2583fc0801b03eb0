# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Logits → probabilities → tokens, for rows with different sampling parameters (decoding.md §3, steps 1–6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

from .decoding import draw, draw_with, stock_warpers

# Whose fault it is that a row has no probabilities: its processors made its logits NaN or infinite; they were so.
PROCESSORS, MODEL = 1, 2


@dataclass(frozen=True)
class SamplingParameters:
    """How a row's logits become probabilities (decoding.md §3). Rows with equal ones are processed together."""

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
        shape = scores.shape
        processed = self.processor(input_ids, scores)
        if isinstance(processed, torch.Tensor) and processed.shape == shape and processed.is_floating_point():
            return processed.to(scores)
        got = type(processed).__name__
        if isinstance(processed, torch.Tensor):
            got = f"{processed.dtype} {list(processed.shape)}"
        raise ValueError(
            f"row {self.row}: the logits processor {type(self.processor).__name__} returned {got}; expected "
            f"{scores.dtype} {list(shape)}, as the scores it got."
        )


class Sampler:
    """Chooses tokens for the rows of a step.

    A row (generation.py's) has `settings`, `committed` and `drafted` counts, `processors` of the caller, and maybe a
    `generator`. `slots` name the rows' lines in `tokens`, and all logits are float32.

    Args:
        tokens: `[slots, capacity]` long, each row's committed tokens and draft; behind them its first token repeated.
        committed, drafted: `[slots]` long, how many these are.
        ends: ids that a row must not take before its least length: the end of turn, null, and the caller's stops.
        generator: draws for every row that has none of its own; None is the global one.
        at: makes a list of places an index on the device.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        committed: torch.Tensor,
        drafted: torch.Tensor,
        ends: list[int],
        generator: torch.Generator | None,
        at: Callable[[list[int]], torch.Tensor],
    ):
        self.tokens, self.committed, self.drafted = tokens, committed, drafted
        self.ends, self.generator, self.at = ends, generator, at
        self.last = {ends[0], *ends[2:]}  # a null ends windows only
        self._warpers: dict[SamplingParameters, LogitsProcessorList] = {}
        self._before: dict[torch.Generator, torch.Tensor] = {}  # states before this step's draws
        self._fresh: list[Any] = []  # rows that got noise of the common generator in this step, once for each line

    def choose(
        self, logits: torch.Tensor, rows: list[Any], slots: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For rows whose tokens all have the committed ones behind them: windows, or AR steps.

        Args:
            logits: `[R, width, V]`, width 6 or 1. In a window only the first token can end a row.

        Returns:
            probabilities `[R, width, V]`, tokens `[R, width]` (argmax, or a draw where the row samples), faults `[R]`
            long: 0, `PROCESSORS` or `MODEL`.
        """
        short = [place for place, row in enumerate(rows) if row.committed < row.settings.least]
        logits = self.hold_back(logits, [(place, 0) for place in short])
        unsound = self.unsound(logits, rows)
        probabilities = self.probabilities(logits, rows, slots)
        faults = self.faults(probabilities, unsound).amax(-1)
        by_generator: dict[torch.Generator | None, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            if row.settings.sampling.samples:
                by_generator[row.generator or self.generator].append(place)
        if len(by_generator) == 1 and all(row.settings.sampling.samples for row in rows):
            return probabilities, self.draw(probabilities, next(iter(by_generator))), faults
        tokens = probabilities.argmax(-1)
        for generator, places in by_generator.items():
            tokens[self.at(places)] = self.draw(probabilities[self.at(places)], generator)
        return probabilities, tokens, faults

    def choose_verified(
        self, causal: torch.Tensor, window: torch.Tensor, rows: list[Any], slots: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """For rows that verify a draft: next-token decoding behind each token of it, and the window behind it all.

        A row that samples draws every position with noise of that position's own, the very noise that mode "slow"
        would draw it with, and the window's draws use it too. A token is therefore what "slow" would draw, whatever
        the draft: the draft only decides in which forward it is drawn, and mostly agrees with it.

        Args:
            causal: `[R, P, V]`, line j behind the committed tokens and j of the draft. Lines after a row's draft may
                hold anything. window: `[R, 6, V]`.

        Returns:
            probabilities `[R, P, V]` and tokens `[R, P]` of next-token decoding, the same of the window, and faults
            `[R, P]` of next-token decoding's lines; of a window, any draft may come.
        """
        width = causal.shape[1]
        short = [
            (place, line)
            for place, row in enumerate(rows)
            for line in range(width)
            if row.committed + line < row.settings.least
        ]
        causal = self.hold_back(causal, short)
        unsound = self.unsound(causal, rows)
        causal = self.probabilities(causal, rows, slots, line_by_line=True)
        window = self.probabilities(window, rows, slots, draft=True)
        # lines after a row's draft are other rows'
        own = torch.arange(width, device=causal.device) <= self.drafted[self.at(slots), None]
        faults = self.faults(causal, unsound) * own
        chosen, drafted = causal.argmax(-1), window.argmax(-1)
        for place, row in enumerate(rows):
            if not row.settings.sampling.samples:
                continue
            noise = self.noise(row, row.drafted + window.shape[1], causal)
            own_lines = row.drafted + 1
            chosen[place, :own_lines] = draw_with(noise[:own_lines], causal[place, :own_lines])
            drafted[place] = draw_with(noise[row.drafted :], window[place])
        return causal, chosen, window, drafted, faults

    def unsound(self, logits: torch.Tensor, rows: list[Any]) -> torch.Tensor | None:
        """`[R, width]` bool, lines of the model's that are no distribution; None where no row has processors, which
        could hide that or do it themselves."""
        if not any(row.processors for row in rows):
            return None
        return ~logits.amax(-1).isfinite()

    @staticmethod
    def faults(probabilities: torch.Tensor, unsound: torch.Tensor | None) -> torch.Tensor:
        """`[R, width]` long of each line: 0, `PROCESSORS` or `MODEL`.

        One NaN, one +inf or nothing but -inf in a line makes every probability of it NaN, so one of them tells.
        """
        broken = probabilities[..., 0].isnan()
        return broken * MODEL if unsound is None else (broken * PROCESSORS).masked_fill(unsound, MODEL)

    def draw(self, probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        self._remember(generator)
        return draw(probabilities, generator)

    def _remember(self, generator: torch.Generator | None) -> None:
        if generator is not None and generator not in self._before:
            self._before[generator] = generator.get_state()

    def keep_draws(self) -> None:
        """The step's tokens are accepted."""
        self._before.clear()
        self._fresh.clear()

    def undo_draws(self) -> None:
        """The step failed and will be done again, with the same numbers."""
        for generator, state in self._before.items():
            generator.set_state(state)
        for row in self._fresh:
            row.noise.pop()
        self.keep_draws()

    def noise(self, row: Any, positions: int, like: torch.Tensor) -> torch.Tensor:
        """`[positions, V]` exponential noise of the row's next tokens; what no token has used yet stays with the row.

        Drawn position by position, so that a generator gives what it would give next-token decoding.
        """
        while len(row.noise) < positions:
            if row.generator is None and self.generator is not None:
                self._remember(self.generator)  # what is drawn again must not lie with a row as well
                self._fresh.append(row)
            fresh = torch.empty(1, like.shape[-1], device=like.device)
            row.noise.append(fresh.exponential_(generator=row.generator or self.generator))
            if row.generator is not None and row.settings.mode != "verified":
                row.noise_ends.append(row.generator.get_state())
        return torch.cat(row.noise[:positions])

    def probabilities(
        self,
        logits: torch.Tensor,
        rows: list[Any],
        slots: list[int],
        *,
        line_by_line: bool = False,
        draft: bool = False,
    ) -> torch.Tensor:
        """`[R, width, V]` logits → probabilities, rows with equal sampling parameters together.

        Args:
            line_by_line: line j has j tokens of the row's draft behind it, as next-token decoding would have them;
                otherwise each line has all there are. draft: only a draft, the caller's processors are left out.
        """
        groups: dict[tuple, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            groups[row.settings.sampling, place if row.processors and not draft else None].append(place)
        result = torch.empty_like(logits) if len(groups) > 1 else logits
        for (sampling, alone), places in groups.items():
            some = logits if len(groups) == 1 else logits[self.at(places)]
            if alone is not None:
                some = self.processed(some, rows[alone], slots[alone], line_by_line)
            elif warpers := self.warpers(sampling):
                behind = self.behind(rows, slots, places, logits.shape[1], line_by_line)
                some = warpers(behind, some.flatten(0, 1)).view(some.shape)
            some = some.softmax(-1)
            if len(groups) == 1:
                return some
            result[self.at(places)] = some
        return result

    def behind(
        self, rows: list[Any], slots: list[int], places: list[int], width: int, line_by_line: bool
    ) -> torch.Tensor:
        """`[R * width, n]` the tokens behind each line, its row's first token repeated behind them."""
        longest = max(rows[place].committed + rows[place].drafted for place in places)
        at = self.at([slots[place] for place in places])
        ids = self.tokens[at, :longest]
        if not line_by_line:
            return ids.repeat_interleave(width, 0)
        lengths = self.committed[at, None] + torch.arange(width, device=ids.device)
        place = torch.arange(longest, device=ids.device)
        return torch.where(place < lengths[..., None], ids[:, None], ids[:, None, :1]).flatten(0, 1)

    def processed(self, logits: torch.Tensor, row: Any, slot: int, line_by_line: bool) -> torch.Tensor:
        """Logits `[1, width, V]` of a row with processors of the caller's own, which see exactly its tokens."""
        checked = LogitsProcessorList([CheckedProcessor(each, row.index) for each in row.processors])
        warpers = self.warpers(row.settings.sampling, checked)
        if not line_by_line:
            # a copy: what a processor writes into it must not become the row's tokens
            ids = self.tokens[slot, : row.committed].repeat(logits.shape[1], 1)
            return warpers(ids, logits[0])[None]
        # as far as the draft holds, so that they are asked what next-token decoding would ask them, and no more
        lines: list[torch.Tensor] = []
        while not lines or (len(lines) <= row.drafted and self.holds(row, slot, lines)):
            line = len(lines)
            behind = self.tokens[slot : slot + 1, : row.committed + line].clone()
            lines.append(warpers(behind, logits[0, line : line + 1]))
        return torch.cat([*lines, logits[0, len(lines) :]])[None]

    def holds(self, row: Any, slot: int, lines: list[torch.Tensor]) -> bool:
        """Whether the draft's next token is the one that the last of these lines `[1, V]` gives, and no end."""
        probabilities = lines[-1].softmax(-1)
        if row.settings.sampling.samples:
            token = int(draw_with(self.noise(row, len(lines), probabilities)[-1:], probabilities))
        else:
            token = int(probabilities.argmax(-1))
        return token not in self.last and token == int(self.tokens[slot, row.committed + len(lines) - 1])

    def hold_back(self, logits: torch.Tensor, lines: list[tuple[int, int]]) -> torch.Tensor:
        """Forbids the end in (place, line)s of rows that are to grow longer."""
        if not lines:
            return logits
        places, columns = (self.at(list(each)) for each in zip(*lines, strict=True))
        logits = logits.clone()
        logits[places[:, None], columns[:, None], self.at(self.ends)] = float("-inf")
        return logits

    def warpers(
        self, sampling: SamplingParameters, processors: LogitsProcessorList | None = None
    ) -> LogitsProcessorList:
        if processors is None and sampling in self._warpers:
            return self._warpers[sampling]
        made = stock_warpers(
            repetition_penalty=sampling.repetition_penalty,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            between=processors,
        )
        if processors is None:
            self._warpers[sampling] = made
        return made
