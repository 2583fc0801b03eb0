# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The generation loop: rows enter slots, take steps together, leave when they finish.

A step is one forward pass of the decoder over every active row's pending tokens and windows, the decoding rules on the
logits, and one small device-to-host copy. Rows differ in everything: prompt, images, mode, limit, sampling
parameters, accepted tokens, finish.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .configuration import WINDOW, TokenRoles
from .cuda_graphs import DecodeGraphs
from .decoding import (
    Acceptance,
    accept_at_most,
    accept_next,
    accept_window,
    leave_label,
    verify,
    verify_label,
    window_tokens,
)
from .kv_cache import DecodeStep, PrefillStep, SlotKVCache, Stretch
from .prefill import Entry, content_of, in_passes, plan
from .sampling import MODEL, Sampler, SamplingParameters

FLAGS = 6  # numbers that a step's line has behind a row's tokens
PREFILL_TOKENS = 8192  # prompt tokens in one prefill pass, at most (one whole prompt at least)
LEAST_PREFILL_TOKENS = 256  # less is not tried after running out of memory
MOST_INDICES = 256
PHASES = ("mtp", "ar", "verified")  # from a window; next-token decoding; next-token decoding of a draft

logger = logging.get_logger(__name__)


def packs(device: torch.device) -> bool:
    """Whether steps leave unused cells out: on CPU arithmetic is what costs, elsewhere the copy that counts them."""
    return device.type == "cpu"


class Decided(NamedTuple):
    """What a step gives each active row, by slot: accepted tokens, their log-probabilities `[R, 6]`, faults `[R]`.

    A row with a fault (sampling.py) accepts nothing and ends.
    """

    accepted: Acceptance
    scores: torch.Tensor
    faults: torch.Tensor


class DecoderModel(Protocol):
    """What the loop needs of a model."""

    def embed_prompt(
        self, input_ids: torch.Tensor, features: list[torch.Tensor], shown: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[T]` ids → `[T, hidden]`, the places of `shown`, `[T]` bool, filled in order from `features`."""

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


@dataclass(frozen=True)
class RowSettings:
    """mode: "hybrid", "fast", "slow" or "verified". limit: the row decodes while it and its prompt are shorter.

    least: tokens, prompt included, before which its end is held back. verify_labels: text in labels is accepted as in
    mode "verified".
    """

    mode: str
    limit: int
    sampling: SamplingParameters
    least: int = 0
    verify_labels: bool = False


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
    verified: bool = field(init=False)
    drafted: int = field(init=False, default=0)  # tokens of the draft behind the committed ones
    reach: int = field(init=False, default=0)  # places of its slot that the row has written
    noise: list[torch.Tensor] = field(init=False, default_factory=list)  # of its next draws, by position
    noise_ends: list[torch.Tensor] = field(init=False, default_factory=list)  # its generator's states behind each
    done: bool = field(init=False, default=False)
    forwards: int = field(init=False, default=0)
    switches: int = field(init=False, default=0)
    cut_at: int | None = field(init=False, default=None)  # tokens of the answer to keep, once that is known
    steps: list[tuple[str, int]] = field(init=False, default_factory=list)  # (mode, tokens accepted)
    phases: list[str] = field(init=False, default_factory=list)  # how each token of the answer was accepted
    scores: list[float] = field(init=False, default_factory=list)  # log-probabilities of the answer's tokens
    sound: torch.Tensor | None = field(init=False, default=None)  # bool, whether its images' features are finite
    error: str | None = field(init=False, default=None)  # why it ended without an end

    def __post_init__(self):
        self.tokens = list(self.prompt)
        self.autoregressive = self.settings.mode == "slow"
        self.verified = self.settings.mode == "verified"

    @property
    def committed(self) -> int:
        return len(self.tokens)

    @property
    def pending(self) -> int:
        return self.committed + self.drafted - self.cached

    @property
    def phase(self) -> str:
        """How the row's next tokens are accepted: one of `PHASES`."""
        return "ar" if self.autoregressive else "verified" if self.verified else "mtp"

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    def spend_noise(self, tokens: int) -> None:
        """So many positions have got their tokens; what is left is for the next ones, as long as a draft is verified.

        A row that leaves a label puts its own generator back behind what was spent: how much lay ready depends on the
        drafts, and so on whether a step was done again after running out of memory.
        """
        if self.verified and not self.done:
            del self.noise[:tokens], self.noise_ends[:tokens]
            return
        if self.generator is not None and tokens < len(self.noise_ends):
            self.generator.set_state(self.noise_ends[tokens - 1])
        self.noise, self.noise_ends = [], []

    def cut(self, length: int) -> None:
        """Keeps `length` tokens of the answer."""
        del self.tokens[len(self.prompt) + length :], self.scores[length:], self.phases[length:]
        ends = list(accumulate((count for _, count in self.steps), initial=0))
        steps = zip(self.steps, ends, strict=False)
        self.steps = [(mode, min(count, length - end)) for (mode, count), end in steps if end < length]

    def fail(self, fault: int) -> None:
        """Ends the row at a step whose numbers gave no tokens."""
        what = "the model's logits are NaN or infinite"
        if fault != MODEL:
            names = ", ".join(type(processor).__name__ for processor in self.processors)
            what = f"its logits processors ({names}) made NaN, +inf or nothing but -inf of the model's finite logits"
        self.error = f"row {self.index}: {what} at token {len(self.answer)} of its answer"
        if fault == MODEL and self.sound is not None and not self.sound:
            self.error += "; its image features were not finite when it entered"
        self.done, self.noise, self.noise_ends = True, [], []

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
        criteria: asked after every accepted token, row by row. One with a method `answer_to_keep`, as
            `DegenerateAnswerCriteria` has, is asked that for the answer's ids, and the answer is cut there.
        streamer: gets the only row's prompt and tokens.
        generator: draws for every row that has none of its own; None is the global one.
        device: where ids live and rules run. graphs: whether to capture decode steps as CUDA graphs.
        scored: whether rows keep the log-probabilities of their tokens.
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
        scored: bool = False,
    ):
        self.model, self.features, self.roles = model, features, roles
        self.rows = rows
        self.waiting = deque(rows)
        self.active: list[Row] = []  # by slot
        self.stops = stops
        self.cutting = [one for one in criteria if hasattr(one, "answer_to_keep")]
        self.criteria = StoppingCriteriaList([one for one in criteria if not hasattr(one, "answer_to_keep")])
        self.streamer, self.scored = streamer, scored
        self.device, self.graphs = device, graphs
        self.packed = packs(device) and not graphs

        slots = min(slots, len(rows))
        capacity = max(row.room for row in rows)
        self.layers, self.slots, self.capacity = layers, slots, capacity + 1
        self.prefill_tokens = PREFILL_TOKENS
        self.empty_cache()
        # Places behind a row's tokens and draft repeat its first one, so that penalties see no token it lacks.
        self.tokens = torch.zeros(slots, self.capacity + WINDOW, dtype=torch.long, device=device)
        self.committed = torch.zeros(slots, dtype=torch.long, device=device)
        self.cached, self.drafted, self.limits = (torch.zeros_like(self.committed) for _ in range(3))
        self.autoregressive = torch.zeros(slots, dtype=torch.bool, device=device)
        self.verified, self.hybrid, self.labels = (torch.zeros_like(self.autoregressive) for _ in range(3))
        # where each slot's lines of the last step's logits begin: behind its tokens, and its window's
        self.causal_lines: list[int] = []
        self.window_lines: list[int] = []
        self._indices: dict[tuple[int, ...], torch.Tensor] = {}
        ends = [roles.end, roles.null, *stops]
        self.sampler = Sampler(self.tokens, self.committed, self.drafted, ends, generator, self.at)

    def run(self) -> list[Row]:
        """Decodes all rows; returns them, finished."""
        try:
            if self.streamer is not None:
                self.streamer.put(torch.tensor(self.rows[0].prompt))
            while self.active or self.waiting:
                try:
                    self.fill_slots()
                    lines = self.commit(self.decide(self.forward())) if self.active else []
                except torch.OutOfMemoryError as error:
                    self.halve(error)
                    continue
                # Not tried again: a row's draw is spent once the row beside it, a criterion or a streamer has its own
                self.hand_out(lines)
            if self.streamer is not None:
                self.streamer.end()
        finally:
            self.close()
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

    def close(self) -> None:
        """Gives the memory back now: a traceback may outlive the call, and the loop's parts refer to each other."""
        self.cache.layers.clear()
        del self.cache, self.run_step, self.sampler

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
        self.sampler.undo_draws()
        self.waiting.extendleft(reversed([row for row in self.active if not row.done]))
        for row in self.waiting:
            row.cached = row.drafted = 0
        self.active = []
        self.empty_cache()
        torch.cuda.empty_cache()  # nothing, where CUDA was never used

    # ---- rows enter and leave

    def fill_slots(self) -> None:
        """Finished rows leave; waiting rows take their slots; without any, the last active row closes the gap."""
        entering: dict[int, Row] = {}
        for slot in reversed(range(len(self.active))):
            if not self.active[slot].done:
                continue
            self.written[slot] = self.active[slot].reach
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
        for state in self.states:
            state[target] = state[source]

    def enter(self, entering: dict[int, Row]) -> None:
        """Caches all but the last token of entering rows; that one is pending in their first step."""
        contents = {}
        for slot, row in entering.items():
            images, lengths = self.features.layout(row.index)
            contents[slot] = content_of(row.tokens[:-1], self.roles.image, images, lengths)
            self.tokens[slot] = row.tokens[0]
            self.tokens[slot, : row.committed] = torch.tensor(row.tokens, device=self.device)
            self.committed[slot], self.cached[slot], self.drafted[slot] = row.committed, row.committed - 1, 0
            self.limits[slot] = row.settings.limit
            self.autoregressive[slot], self.verified[slot] = row.autoregressive, row.verified
            self.hybrid[slot], self.labels[slot] = row.settings.mode == "hybrid", row.settings.verify_labels
        for planned in plan(contents, self.residents):
            entries = list(self.sound(planned))
            for entry in entries:
                kept = entry.shared if entry.donor == entry.slot else 0
                self.cache.clear(entry.slot, kept, self.written[entry.slot])
                if entry.shared > kept:
                    self.cache.move(entry.donor, entry.slot, entry.shared)
            for group in in_passes(entries, self.prefill_tokens):
                self.prefill(group, contents)
        for slot, row in entering.items():
            row.cached = row.reach = row.committed - 1
            self.residents[slot] = contents[slot]
            self.features.release(row.index)

    def sound(self, planned: list[Entry]) -> Iterator[Entry]:
        """Entries that share finite numbers only; the others are computed whole.

        NaN in one picture spreads to the tokens before it: 0 × NaN, under the causal mask.
        """
        anew = set()  # slots that will not hold what was to be copied from them
        for entry in planned:
            if entry.donor in anew or (entry.shared and not self.cache.is_finite(entry.donor, entry.shared)):
                anew.add(entry.slot)
                yield Entry(entry.slot, entry.length)
            else:
                yield entry

    def prefill(self, group: list[Entry], contents: dict[int, np.ndarray]) -> None:
        """One packed pass over what of these rows' prompts is not shared."""
        stretches = [Stretch(entry.slot, entry.shared, entry.length - entry.shared) for entry in group]
        stretches = [stretch for stretch in stretches if stretch.length]
        if not stretches:
            return
        # image slots before a stretch are cached already, and their features not needed
        showing = [contents[stretch.slot] < 0 for stretch in stretches]
        skipped = [int(each[: stretch.cached].sum()) for each, stretch in zip(showing, stretches, strict=True)]
        wanted = [(self.active[stretch.slot].index, skip) for stretch, skip in zip(stretches, skipped, strict=True)]
        step = PrefillStep(stretches, self.device)
        ids = self.tokens[step.slots, step.offsets]
        # not every image token: in an answer that is cached again, after out of memory, it is a word
        spans = [each[stretch.cached :][: stretch.length] for each, stretch in zip(showing, stretches, strict=True)]
        shown = torch.from_numpy(np.concatenate(spans)).to(self.device)
        embeddings = self.model.embed_prompt(ids, self.features.take(wanted), shown)
        # asked for only if the row fails
        finite = embeddings.isfinite().all(-1) | ~shown.to(embeddings.device)
        for stretch, own in zip(stretches, finite.split([stretch.length for stretch in stretches]), strict=True):
            self.active[stretch.slot].sound = own.all()
        self.model.decode(embeddings, step, self.cache)

    # ---- one step

    def forward(self) -> torch.Tensor:
        """One pass of the decoder over the active rows. Returns lines of logits `[N, V]` float32, see `lines_of`."""
        windows = not all(row.autoregressive for row in self.active)
        all_lines = not self.packed and any(row.verified for row in self.active)
        pending = WINDOW if all_lines else max(row.pending for row in self.active)
        for row in self.active:
            row.reach = max(row.reach, row.committed + row.drafted + WINDOW * (not row.autoregressive))
        logits = self.run_step(
            rows=len(self.active),
            pending=pending,
            windows=windows,
            all_lines=all_lines,
            longest=max(row.reach for row in self.active),
        )
        self.causal_lines, self.window_lines, line = [], [], 0
        for row in self.active:
            if self.packed:
                causal, window = 0, row.drafted + 1 if row.verified else 0
                count = 1 if row.autoregressive else window + WINDOW
            elif all_lines:
                causal, window, count = row.pending - row.drafted - 1, pending, pending + WINDOW
            else:
                causal, window, count = 0, 0, WINDOW if windows else 1
            self.causal_lines.append(line + causal)
            self.window_lines.append(line + window)
            line += count
        return logits.to(self.device, torch.float32)

    def compute(self, rows: int, pending: int, windows: bool, all_lines: bool, longest: int) -> torch.Tensor:
        """The pass itself, a function of the state on the device and of these shapes only: CUDA graphs capture it."""
        step = DecodeStep(
            self.committed[:rows],
            self.cached[:rows],
            self.drafted[:rows],
            self.autoregressive[:rows],
            self.verified[:rows],
            pending=pending,
            windows=windows,
            longest=longest,
            packed=self.packed,
            all_lines=all_lines,
        )
        ids = self.tokens[step.slots, step.positions.squeeze(0)].masked_fill(step.masked, self.roles.mask)
        hidden = self.model.decode(self.model.embed_prompt(ids, []), step, self.cache)
        return self.model.logits(hidden[step.lines.to(hidden.device)])

    def lines_of(self, logits: torch.Tensor, starts: list[int], width: int) -> torch.Tensor:
        """The `width` lines from each of `starts` on: `[rows, width, V]`. What lies behind the last line is that."""
        if len(starts) * width == len(logits):
            return logits.unflatten(0, (-1, width))
        lines = [min(start + line, len(logits) - 1) for start in starts for line in range(width)]
        return logits[self.at(lines)].unflatten(0, (-1, width))

    def decide(self, logits: torch.Tensor) -> Decided:
        """The decoding rules."""
        slots: dict[str, list[int]] = defaultdict(list)
        for slot, row in enumerate(self.active):
            slots[row.phase].append(slot)
        rules = {"ar": self.decide_next, "mtp": self.decide_window, "verified": self.decide_verified}
        parts = [rules[phase](logits, members) for phase, members in slots.items()]
        if len(parts) == 1:
            return parts[0]
        order = self.at([slot for members in slots.values() for slot in members]).argsort()
        widest = max(part.accepted.tokens.shape[1] for part in parts)
        accepted = [each._replace(tokens=F.pad(each.tokens, (0, widest - each.tokens.shape[1]))) for each, *_ in parts]
        joined = Acceptance(*(torch.cat(each)[order] for each in zip(*accepted, strict=True)))
        scores = torch.cat([part.scores for part in parts])[order]
        return Decided(joined, scores, torch.cat([part.faults for part in parts])[order])

    def decide_next(self, logits: torch.Tensor, slots: list[int]) -> Decided:
        """An AR step of the rows in `slots`."""
        lines = self.lines_of(logits, [self.causal_lines[slot] for slot in slots], 1)
        probabilities, tokens, faults = self.sampler.choose(lines, [self.active[slot] for slot in slots], slots)
        accepted = accept_next(tokens[:, 0], self.hybrid[self.at(slots)], self.roles)
        return Decided(accepted, self.log_probabilities(probabilities, accepted), faults)

    def decide_window(self, logits: torch.Tensor, slots: list[int]) -> Decided:
        """An MTP step of the rows in `slots`."""
        lines = self.lines_of(logits, [self.window_lines[slot] for slot in slots], WINDOW)
        probabilities, candidates, faults = self.sampler.choose(lines, [self.active[slot] for slot in slots], slots)
        hybrid = self.hybrid[self.at(slots)]
        tokens = window_tokens(probabilities, candidates, hybrid, self.roles)
        accepted = accept_window(tokens, hybrid, self.roles)
        if any(self.active[slot].settings.verify_labels for slot in slots):
            accepted = verify_label(accepted, self.labels[self.at(slots)], self.roles)
        return Decided(accepted, self.log_probabilities(probabilities, accepted), faults)

    def decide_verified(self, logits: torch.Tensor, slots: list[int]) -> Decided:
        """A step of the rows in `slots` that verifies their drafts."""
        rows, at = [self.active[slot] for slot in slots], self.at(slots)
        width = 1 + max(row.drafted for row in rows) if self.packed else WINDOW
        causal = self.lines_of(logits, [self.causal_lines[slot] for slot in slots], width)
        window = self.lines_of(logits, [self.window_lines[slot] for slot in slots], WINDOW)
        probabilities, chosen, window, candidates, faults = self.sampler.choose_verified(causal, window, rows, slots)
        tokens = window_tokens(window, candidates, torch.zeros_like(self.hybrid[at]), self.roles)
        place = self.committed[at, None] + torch.arange(width - 1, device=self.device)
        draft, drafted = self.tokens[at].gather(1, place), self.drafted[at]
        accepted = verify(chosen, draft, drafted, tokens, self.roles)
        # a fault behind tokens of a draft comes to light once they are committed
        accepted = accept_at_most(accepted, (faults == 0).long().cumprod(-1).sum(-1))
        if any(row.settings.verify_labels for row in rows):
            accepted = leave_label(accepted, self.labels[at], self.roles)
        return Decided(accepted, self.log_probabilities(probabilities, accepted), faults[:, 0])

    def log_probabilities(self, probabilities: torch.Tensor, accepted: Acceptance) -> torch.Tensor:
        """`[R, 6]` of the accepted tokens, under the distributions they were accepted from."""
        if not self.scored:
            return probabilities.new_zeros(len(probabilities), WINDOW)
        tokens = accepted.tokens[:, : probabilities.shape[1], None]
        scores = probabilities.gather(-1, tokens).squeeze(-1).log()
        return F.pad(scores, (0, WINDOW - scores.shape[1]))

    def commit(self, decided: Decided) -> list[tuple[list[int], list[float]]]:
        """Accepted tokens join their rows on the device; the step's only copy brings them to the host.

        Returns:
            Of each active row its tokens and flags, for `hand_out`, and its tokens' scores.
        """
        accepted, scores, faults = decided
        rows = len(self.active)
        column = torch.arange(accepted.tokens.shape[1], device=self.device)
        tokens, committed, verified = self.tokens[:rows], self.committed[:rows], self.verified[:rows]
        # a draft that reached the limit would have no place in the cache
        drafted = accepted.drafted.minimum(self.limits[:rows] - committed - accepted.lengths - 1).clamp(min=0)
        kept = torch.where(column < (accepted.lengths + drafted)[:, None], accepted.tokens, tokens[:, :1])
        tokens.scatter_(1, committed[:, None] + column, kept)
        # what was verified has been fed, but for the last token; what a window said has not
        self.cached[:rows] = torch.where(verified, committed + accepted.lengths - 1, committed)
        committed += accepted.lengths
        self.drafted[:rows] = drafted
        self.autoregressive[:rows], self.verified[:rows] = accepted.autoregressive, accepted.verified

        flags = (accepted.lengths, drafted, accepted.autoregressive, accepted.verified, accepted.finished, faults)
        parts = [accepted.tokens[:, :WINDOW], torch.stack(flags, 1)]
        if self.scored:
            parts.append(scores.view(torch.int32))
        lines = torch.cat(parts, 1).cpu()
        self.sampler.keep_draws()
        scored = lines[:, -WINDOW:].int().view(torch.float32).tolist() if self.scored else [[]] * rows
        return list(zip(lines.tolist(), scored, strict=True))

    def hand_out(self, lines: list[tuple[list[int], list[float]]]) -> None:
        """Accepted tokens join their rows on the host; the caller's criteria and streamer hear of them."""
        for row, (line, values) in zip(self.active, lines, strict=True):
            length, drafted, autoregressive, verified, finished, fault = line[WINDOW : WINDOW + FLAGS]
            if fault:
                row.forwards += 1
                row.steps.append((row.phase, 0))
                row.fail(fault)
                continue
            self.extend(row, line[:length], values, drafted, bool(autoregressive), bool(verified), bool(finished))

    def extend(
        self,
        row: Row,
        new: list[int],
        scores: list[float],
        drafted: int,
        autoregressive: bool,
        verified: bool,
        finished: bool,
    ) -> None:
        kept = self.before_stop(row, new)
        # the stock counts an AR step that ends its row among the MTP ones
        phase = "mtp" if row.autoregressive and finished else row.phase
        row.steps.append((phase, len(kept)))
        row.switches += autoregressive and not row.autoregressive
        row.forwards += 1
        row.cached = row.committed + len(new) - 1 if row.verified else row.committed
        row.tokens += kept
        row.scores += scores[: len(kept)]
        row.phases += [row.phase] * len(kept)
        row.drafted, row.autoregressive, row.verified = drafted, autoregressive, verified
        row.done = finished or row.done or row.committed >= row.settings.limit
        row.spend_noise(len(kept))
        if row.cut_at is not None:
            kept = kept[: max(0, row.cut_at - (row.committed - len(row.prompt) - len(kept)))]
            row.cut(row.cut_at)
        if self.streamer is not None:
            self.streamer.put(torch.tensor(kept))

    def before_stop(self, row: Row, new: list[int]) -> list[int]:
        """The accepted tokens up to the first that ends the row by the caller's stops or criteria."""
        if not self.stops and not self.criteria and not self.cutting:
            return new
        answer = row.answer if self.cutting else []
        for count, token in enumerate(new, 1):
            answer.append(token)
            if token in self.stops and row.committed + count > row.settings.least:
                row.done = True
            elif self.criteria:
                ids = torch.tensor([row.tokens + new[:count]], device=self.device)
                row.done = self.ended(ids)
            row.cut_at = next((kept for one in self.cutting if (kept := one.answer_to_keep(answer)) is not None), None)
            row.done = row.done or row.cut_at is not None
            if row.done:
                return new[:count]
        return new

    def ended(self, ids: torch.Tensor) -> bool:
        """Whether one of the caller's criteria ends a row of these ids, `[1, n]`; each of them is asked."""
        ends = False
        for criterion in self.criteria:
            told = criterion(ids, None)
            try:
                ends |= bool(torch.as_tensor(told).any())
            except (RuntimeError, TypeError, ValueError) as error:
                name = getattr(criterion, "__name__", type(criterion).__name__)
                raise ValueError(f"stopping_criteria: {name} gave {told!r}; expected a bool or a tensor.") from error
        return ends

    @property
    def states(self) -> tuple[torch.Tensor, ...]:
        """What the device knows of each slot's row."""
        numbers = (self.tokens, self.committed, self.cached, self.drafted, self.limits)
        return (*numbers, self.autoregressive, self.verified, self.hybrid, self.labels)

    def at(self, places: list[int]) -> torch.Tensor:
        """`places` as an index on the device; the same few come at every step, so they are copied there once."""
        key = tuple(places)
        if key not in self._indices:
            if len(self._indices) > MOST_INDICES:
                self._indices.clear()
            self._indices[key] = torch.tensor(places, dtype=torch.long, device=self.device)
        return self._indices[key]
