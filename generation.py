# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The generation loop: rows enter slots, take steps together, leave when they finish.

A step is one forward pass of the decoder over every active row's pending tokens and windows, the decoding rules on the
logits, and one small device-to-host copy. Rows differ in everything: prompt, images, mode, limit, recipe, accepted
tokens, finish.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .configuration import WINDOW, TokenRoles
from .cuda_graphs import DecodeGraphs
from .decoding import Acceptance, accept_next, accept_window, draw, stock_warpers, window_tokens
from .kv_cache import DecodeStep, PrefillStep, SlotKVCache, Stretch
from .prefill import Entry, content_of, in_passes, plan
from .settings import Recipe, RowSettings

PREFILL_TOKENS = 8192  # prompt tokens in one prefill pass, at most (one whole prompt at least)
LEAST_PREFILL_TOKENS = 256  # less is not tried after running out of memory
MOST_INDICES = 256

logger = logging.get_logger(__name__)


def packs(device: torch.device) -> bool:
    """Whether steps leave unused cells out: on CPU arithmetic is what costs, elsewhere the copy that counts them."""
    return device.type == "cpu"


class DecoderModel(Protocol):
    """What the loop needs of a model."""

    def embed_prompt(self, input_ids: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """`[T]` ids, image slots filled in order from `features` → `[T, hidden]`."""

    def decode(self, embeddings: torch.Tensor, step: PrefillStep | DecodeStep, cache: SlotKVCache) -> torch.Tensor:
        """`[T, hidden]` → `[T, hidden]`, keys and values written to the cache."""

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[N, hidden]` → `[N, vocabulary]` float32."""


class Features(Protocol):
    """Image features on demand, so that they are computed when their rows enter and freed after."""

    def layout(self, row: int) -> tuple[list[int], list[int]]:
        """What a row's image slots show: the identity of each image, equal for equal images, and its tokens."""

    def take(self, wanted: list[tuple[int, int]]) -> list[torch.Tensor]:
        """Features `[tokens, hidden]` of each (row, tokens to skip)'s images, in order."""

    def release(self, row: int) -> None:
        """A row has entered; features that no other row waits for may go."""

    def halve(self) -> None:
        """Memory ran out: encode in passes of half the size."""


@dataclass
class Row:
    """One row from prompt to answer. `tokens` are the committed ones, prompt included."""

    index: int
    prompt: list[int]
    settings: RowSettings
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    generator: torch.Generator | None = None
    tokens: list[int] = field(init=False)
    cached: int = field(init=False, default=0)
    autoregressive: bool = field(init=False)
    done: bool = field(init=False, default=False)
    forwards: int = field(init=False, default=0)
    switches: int = field(init=False, default=0)
    steps: list[tuple[str, int]] = field(init=False, default_factory=list)  # (mode, tokens accepted)

    def __post_init__(self):
        self.tokens = list(self.prompt)
        self.autoregressive = self.settings.mode == "slow"

    @property
    def committed(self) -> int:
        return len(self.tokens)

    @property
    def pending(self) -> int:
        return self.committed - self.cached

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def room(self) -> int:
        """Cache places the row can come to need: a step from limit - 1 tokens writes a window behind them."""
        return self.settings.limit + WINDOW


class GenerationLoop:
    """Decodes rows to their ends.

    Args:
        model, features: see the protocols. layers: of the decoder.
        slots: rows decoded at a time; further rows wait and take the slots of finished ones.
        stops: ids that end a row, and its answer, wherever they are accepted.
        criteria: asked after every accepted token, row by row.
        streamer: gets the only row's prompt and tokens.
        generator: draws for every row that has none of its own; None is the global one.
        device: where ids live and rules run. graphs: whether to capture decode steps as CUDA graphs.
    """

    def __init__(
        self,
        model: DecoderModel,
        features: Features,
        rows: list[Row],
        roles: TokenRoles,
        *,
        layers: int,
        slots: int,
        stops: frozenset[int],
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        generator: torch.Generator | None,
        device: torch.device,
        graphs: bool = False,
    ):
        self.model, self.features, self.roles = model, features, roles
        self.rows = rows
        self.waiting = deque(rows)
        self.active: list[Row] = []  # by slot
        self.stops, self.criteria = stops, criteria
        self.streamer, self.generator = streamer, generator
        self.device, self.graphs = device, graphs
        self.packed = packs(device) and not graphs

        slots = min(slots, len(rows))
        capacity = max(row.room for row in rows)
        self.layers, self.slots, self.capacity = layers, slots, capacity + 1
        self.prefill_tokens = PREFILL_TOKENS
        self.empty_cache()
        # Places behind a row's committed tokens repeat its first one, so that penalties see no token it lacks.
        self.tokens = torch.zeros(slots, self.capacity, dtype=torch.long, device=device)
        self.committed = torch.zeros(slots, dtype=torch.long, device=device)
        self.cached = torch.zeros_like(self.committed)
        self.autoregressive = torch.zeros(slots, dtype=torch.bool, device=device)
        self.hybrid = torch.zeros_like(self.autoregressive)
        self.first_line: list[int] = []  # of each slot, in the last step's logits
        self._warpers: dict[Recipe, LogitsProcessorList] = {}
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}

    def run(self) -> list[Row]:
        """Decodes all rows; returns them, finished."""
        if self.streamer is not None:
            self.streamer.put(torch.tensor(self.rows[0].prompt))
        while self.active or self.waiting:
            try:
                self.fill_slots()
                if self.active:
                    self.commit(self.decide(self.forward()))
            except torch.OutOfMemoryError as error:
                self.halve(error)
        if self.streamer is not None:
            self.streamer.end()
        return self.rows

    # ---- memory

    def empty_cache(self) -> None:
        self.cache = SlotKVCache(self.layers, self.slots, self.capacity)
        self.residents: dict[int, np.ndarray] = {}  # contents of the prompts that slots hold
        self.written = [0] * self.slots  # how far the last row of a slot wrote
        # a graph holds the addresses of this cache
        self.run_step = (
            DecodeGraphs(self.compute, slots=self.slots, capacity=self.capacity) if self.graphs else self.compute
        )

    def halve(self, error: torch.OutOfMemoryError) -> None:
        """Goes on with half the slots and half the prompt tokens and patches a pass.

        Unfinished rows wait again, with the tokens they have; what they had cached is computed anew.
        """
        if self.slots == 1 and self.prefill_tokens <= LEAST_PREFILL_TOKENS:
            raise error
        logger.warning_once(f"out of memory with {self.slots} rows at a time; going on with half of it")
        self.slots = max(1, self.slots // 2)
        self.prefill_tokens = max(LEAST_PREFILL_TOKENS, self.prefill_tokens // 2)
        self.features.halve()
        self.waiting.extendleft(reversed([row for row in self.active if not row.done]))
        for row in self.waiting:
            row.cached = 0
        self.active = []
        self.empty_cache()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- rows enter and leave

    def fill_slots(self) -> None:
        """Finished rows leave; waiting rows take their slots; without any, the last active row closes the gap."""
        entering: dict[int, Row] = {}
        for slot in reversed(range(len(self.active))):
            if not self.active[slot].done:
                continue
            self.written[slot] = self.active[slot].cached + WINDOW
            if self.waiting:
                self.active[slot] = entering[slot] = self.waiting.popleft()
                continue
            last, place = self.active.pop(), len(self.active)
            if slot == place:
                continue
            self.active[slot] = last
            if place in entering:
                entering[slot] = entering.pop(place)
            else:
                self.move(place, slot)
        while self.waiting and len(self.active) < self.slots:
            entering[len(self.active)] = self.waiting[0]
            self.active.append(self.waiting.popleft())
        if entering:
            self.enter(dict(sorted(entering.items())))

    def move(self, source: int, target: int) -> None:
        """The row of slot `source`, whose place is closed, goes on in slot `target`."""
        row = self.active[target]
        self.cache.move(source, target, row.cached)
        self.cache.clear(target, row.cached, self.written[target])
        self.residents[target] = self.residents.pop(source)
        for state in (self.tokens, self.committed, self.cached, self.autoregressive, self.hybrid):
            state[target] = state[source]

    def enter(self, entering: dict[int, Row]) -> None:
        """Caches all but the last token of entering rows; that one is pending in their first step."""
        contents = {}
        for slot, row in entering.items():
            images, lengths = self.features.layout(row.index)
            contents[slot] = content_of(row.tokens[:-1], self.roles.image, images, lengths)
            self.tokens[slot] = row.tokens[0]
            self.tokens[slot, : row.committed] = torch.tensor(row.tokens, device=self.device)
            self.committed[slot], self.cached[slot] = row.committed, row.committed - 1
            self.autoregressive[slot] = row.autoregressive
            self.hybrid[slot] = row.settings.mode == "hybrid"
        for planned in plan(contents, self.residents):
            # NaN in one picture spreads to the tokens before it (0 × NaN under the causal mask): it must not be shared
            entries = [entry if self.is_sound(entry) else Entry(entry.slot, entry.length) for entry in planned]
            for entry in entries:
                kept = entry.shared if entry.donor == entry.slot else 0
                self.cache.clear(entry.slot, kept, self.written[entry.slot])
                if entry.shared > kept:
                    self.cache.move(entry.donor, entry.slot, entry.shared)
            for group in in_passes(entries, self.prefill_tokens):
                self.prefill(group, contents)
        for slot, row in entering.items():
            row.cached = row.committed - 1
            self.residents[slot] = contents[slot]
            self.features.release(row.index)

    def is_sound(self, entry: Entry) -> bool:
        return not entry.shared or self.cache.is_finite(entry.donor, entry.shared)

    def prefill(self, group: list[Entry], contents: dict[int, np.ndarray]) -> None:
        """One packed pass over what of these rows' prompts is not shared."""
        stretches = [Stretch(entry.slot, entry.shared, entry.length - entry.shared) for entry in group]
        stretches = [stretch for stretch in stretches if stretch.length]
        if not stretches:
            return
        # image slots before a stretch are cached already, and their features not needed
        shown = [int((contents[stretch.slot][: stretch.cached] < 0).sum()) for stretch in stretches]
        wanted = [(self.active[stretch.slot].index, skip) for stretch, skip in zip(stretches, shown, strict=True)]
        step = PrefillStep(stretches, self.device)
        ids = self.tokens[step.slots, step.offsets]
        self.model.decode(self.model.embed_prompt(ids, self.features.take(wanted)), step, self.cache)

    # ---- one step

    def forward(self) -> torch.Tensor:
        """One pass of the decoder over the active rows. Returns lines of logits `[N, V]` float32, see `lines_of`."""
        ar = [row.autoregressive for row in self.active]
        logits = self.run_step(
            rows=len(self.active),
            pending=max(row.pending for row in self.active),
            windows=not all(ar),
            longest=max(row.committed + WINDOW * (not row.autoregressive) for row in self.active),
        )
        widths = [1 if one else WINDOW for one in ar] if self.packed else [WINDOW if not all(ar) else 1] * len(ar)
        self.first_line = list(accumulate(widths, initial=0))
        return logits.to(self.device, torch.float32)

    def compute(self, rows: int, pending: int, windows: bool, longest: int) -> torch.Tensor:
        """The pass itself, a function of the state on the device and of these shapes only: CUDA graphs capture it."""
        step = DecodeStep(
            self.committed[:rows],
            self.cached[:rows],
            self.autoregressive[:rows],
            pending=pending,
            windows=windows,
            longest=longest,
            packed=self.packed,
        )
        ids = self.tokens[step.slots, step.positions.squeeze(0)].masked_fill(step.masked, self.roles.mask)
        hidden = self.model.decode(self.model.embed_prompt(ids, []), step, self.cache)
        return self.model.logits(hidden[step.lines.to(hidden.device)])

    def hold_back(self, logits: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """Forbids the end to rows that are to grow longer: in a window only its first token can end a row."""
        rows = [self.active[slot] for slot in slots]
        short = [place for place, row in enumerate(rows) if row.committed < row.settings.least]
        if short:
            ends = torch.tensor([self.roles.end, self.roles.null, *self.stops], device=self.device)
            logits = logits.clone()
            logits[self.at(short)[:, None], 0, ends] = float("-inf")
        return logits

    def lines_of(self, logits: torch.Tensor, slots: list[int], width: int) -> torch.Tensor:
        """The logits `[rows, width, V]` of the rows in `slots`."""
        if len(slots) * width == len(logits):
            return logits.unflatten(0, (-1, width))
        lines = [self.first_line[slot] + line for slot in slots for line in range(width)]
        return logits[self.at(lines)].unflatten(0, (-1, width))

    def decide(self, logits: torch.Tensor) -> Acceptance:
        """The decoding rules: what each active row accepts, by slot."""
        ar = [slot for slot, row in enumerate(self.active) if row.autoregressive]
        mtp = [slot for slot, row in enumerate(self.active) if not row.autoregressive]
        parts = []
        if ar:
            _, tokens = self.choose(self.lines_of(logits, ar, 1), ar)
            parts.append(accept_next(tokens[:, 0], self.hybrid[self.at(ar)], self.roles))
        if mtp:
            probabilities, candidates = self.choose(self.lines_of(logits, mtp, WINDOW), mtp)
            hybrid = self.hybrid[self.at(mtp)]
            tokens = window_tokens(probabilities, candidates, hybrid, self.roles)
            parts.append(accept_window(tokens, hybrid, self.roles))
        if len(parts) == 1:
            return parts[0]
        order = self.at(ar + mtp).argsort()
        return Acceptance(*(torch.cat(both)[order] for both in zip(*parts, strict=True)))

    def choose(self, logits: torch.Tensor, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """decoding.md §3 steps 1–6 for the rows in `slots`, by recipe.

        Args:
            logits: `[rows, width, V]` float32, width 6 (MTP) or 1 (AR).

        Returns:
            probabilities `[rows, width, V]`, tokens `[rows, width]` (argmax, or a draw where the row samples).
        """
        logits = self.hold_back(logits, slots)
        groups: dict[tuple, list[int]] = defaultdict(list)
        for place, slot in enumerate(slots):
            row = self.active[slot]
            alone = slot if row.processors or (row.generator is not None and row.settings.recipe.samples) else None
            groups[row.settings.recipe, alone].append(place)
        if len(groups) == 1:
            return self.choose_alike(logits, slots)
        probabilities = torch.empty_like(logits)
        tokens = torch.empty(logits.shape[:2], dtype=torch.long, device=self.device)
        for places in groups.values():
            at = self.at(places)
            probabilities[at], tokens[at] = self.choose_alike(logits[at], [slots[place] for place in places])
        return probabilities, tokens

    def choose_alike(self, logits: torch.Tensor, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """`choose` for rows with one recipe, and one generator if they sample."""
        rows = [self.active[slot] for slot in slots]
        recipe, width = rows[0].settings.recipe, logits.shape[1]
        if warpers := self.warpers(rows[0]):
            longest = max(row.committed for row in rows)
            ids = self.tokens[self.at(slots), :longest].repeat_interleave(width, 0)
            logits = warpers(ids, logits.flatten(0, 1)).view(logits.shape)
        probabilities = logits.softmax(-1)
        if recipe.samples:
            return probabilities, draw(probabilities, rows[0].generator or self.generator)
        return probabilities, probabilities.argmax(-1)

    def warpers(self, row: Row) -> LogitsProcessorList:
        recipe = row.settings.recipe
        if row.processors or recipe not in self._warpers:
            made = stock_warpers(
                repetition_penalty=recipe.repetition_penalty,
                temperature=recipe.temperature,
                top_p=recipe.top_p,
                top_k=recipe.top_k,
                between=row.processors,
            )
            if row.processors:
                return made
            self._warpers[recipe] = made
        return self._warpers[recipe]

    def commit(self, accepted: Acceptance) -> None:
        """Accepted tokens join their rows, on the device and, by the step's only copy, on the host."""
        rows = len(self.active)
        column = torch.arange(WINDOW, device=self.device)
        tokens, committed = self.tokens[:rows], self.committed[:rows]
        kept = torch.where(column < accepted.lengths[:, None], accepted.tokens, tokens[:, :1])
        tokens.scatter_(1, committed[:, None] + column, kept)
        self.cached[:rows] = committed
        committed += accepted.lengths
        self.autoregressive[:rows] = accepted.autoregressive

        flags = torch.stack([accepted.lengths, accepted.autoregressive.long(), accepted.finished.long()], 1)
        for row, line in zip(self.active, torch.cat([accepted.tokens, flags], 1).tolist(), strict=True):
            count, autoregressive, finished = line[WINDOW:]
            self.extend(row, line[:count], bool(autoregressive), bool(finished))

    def extend(self, row: Row, new: list[int], autoregressive: bool, finished: bool) -> None:
        kept = self.before_stop(row, new)
        # the stock counts an AR step that ends its row among the MTP ones
        row.steps.append(("ar" if row.autoregressive and not finished else "mtp", len(kept)))
        row.switches += autoregressive and not row.autoregressive
        row.forwards += 1
        row.cached = row.committed
        row.tokens += kept
        row.autoregressive = autoregressive
        row.done = finished or row.done or row.committed >= row.settings.limit
        if self.streamer is not None:
            self.streamer.put(torch.tensor(kept))

    def before_stop(self, row: Row, new: list[int]) -> list[int]:
        """The accepted tokens up to the first that ends the row by the caller's stops or criteria."""
        if not self.stops and not self.criteria:
            return new
        for count, token in enumerate(new, 1):
            if token in self.stops and row.committed + count > row.settings.least:
                row.done = True
            elif self.criteria:
                ids = torch.tensor([row.tokens + new[:count]], device=self.device)
                row.done = bool(torch.as_tensor(self.criteria(ids, None)).any())
            if row.done:
                return new[:count]
        return new

    def at(self, places: list[int]) -> torch.Tensor:
        """`places` as an index on the device; the same few come at every step, so they are copied there once."""
        key = tuple(places)
        if key not in self._indices:
            if len(self._indices) > MOST_INDICES:
                self._indices.clear()
            self._indices[key] = torch.tensor(places, dtype=torch.long, device=self.device)
        return self._indices[key]
