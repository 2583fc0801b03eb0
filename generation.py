# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The generation loop: rows enter slots, take steps together, leave when they finish.

A step: schedule (rows enter and leave, their state goes to the device in one copy), forward (one pass of the decoder
over their pending tokens and windows), decide (the rules on its logits, and one copy to the host), postprocess (tokens
join their rows). Rows differ in everything: prompt, images, mode, limit, sampling parameters, accepted tokens, finish.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .configuration import WINDOW, TokenRoles
from .cuda_graphs import DecodeGraphs
from .decoding import Phase, accept_next, accept_window, leave_label, verify, verify_label, window_tokens
from .kv_cache import DecodeStep, PrefillStep, PromptChunk, SlotKVCache, State, content_of, in_passes, share_prefixes
from .sampling import MODEL, Sampler, SamplingParameters

PREFILL_TOKENS = 8192  # prompt tokens in one prefill pass, at most (one whole prompt at least)
LEAST_PREFILL_TOKENS = 256  # less is not tried after running out of memory
FIRST_PHASE = {"hybrid": Phase.MTP, "fast": Phase.MTP, "slow": Phase.AR, "verified": Phase.VERIFIED}

logger = logging.get_logger(__name__)


def packs(device: torch.device) -> bool:
    """Whether steps leave unused cells out: on CPU arithmetic is what costs, elsewhere the copy that counts them."""
    return device.type == "cpu"


@dataclass(frozen=True)
class RowSettings:
    """mode: "hybrid", "fast", "slow" or "verified". limit: the row decodes while it and its prompt are shorter. least:
    tokens, prompt included, before which its end is held back. verify_labels: text in labels is accepted as in mode
    "verified"."""

    mode: str
    limit: int
    sampling: SamplingParameters
    least: int = 0
    verify_labels: bool = False


@dataclass(eq=False)
class Row:
    """One row from prompt to answer, and all that is known of it. `tokens` are the committed ones, prompt included."""

    index: int
    prompt: list[int]
    settings: RowSettings
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    generator: torch.Generator | None = None
    tokens: list[int] = field(init=False)
    draft: list[int] = field(init=False, default_factory=list)  # behind the committed tokens, to be verified
    cached: int = field(init=False, default=0)  # tokens that its slot holds
    phase: Phase = field(init=False)
    forwards: int = field(init=False, default=0)
    switches: int = field(init=False, default=0)  # to next-token decoding
    accepted: list[tuple[Phase, int]] = field(init=False, default_factory=list)  # tokens of each forward
    scores: list[float] = field(init=False, default_factory=list)  # log-probabilities of the answer's tokens
    noise: list[tuple] = field(init=False, default_factory=list)  # of its next draws; its generator's state behind
    sound: torch.Tensor | None = field(init=False, default=None)  # bool, whether its images' features are finite
    finish_reason: str | None = field(init=False, default=None)  # "end", "limit", "stop", "repetition" or "error"
    error: str | None = field(init=False, default=None)

    def __post_init__(self):
        self.tokens, self.phase = list(self.prompt), FIRST_PHASE[self.settings.mode]

    @property
    def committed(self) -> int:
        return len(self.tokens)

    @property
    def pending(self) -> list[int]:
        """What its next step feeds before the window: at most six tokens."""
        return self.tokens[self.cached :] + self.draft

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def phases(self) -> list[Phase]:
        """How each token of the answer was accepted."""
        return [phase for phase, count in self.accepted for _ in range(count)]

    @property
    def steps(self) -> list[tuple[str, int]]:
        """(mode, tokens) of each forward; the stock counts an AR step that ends its row among the MTP ones."""
        steps = [(phase.name.lower(), count) for phase, count in self.accepted]
        if self.finish_reason == "end" and steps[-1][0] == "ar":
            steps[-1] = ("mtp", steps[-1][1])
        return steps

    @property
    def room(self) -> int:
        """Cache places the row can come to need: a step from limit - 1 tokens writes a window behind them."""
        return self.settings.limit + WINDOW

    @property
    def state(self) -> list[int]:
        """Its columns of `State`, but for the order."""
        pending = (self.pending + self.tokens[:1] * WINDOW)[:WINDOW]
        flags = self.settings.mode == "hybrid", self.settings.verify_labels
        return [self.committed, self.cached, len(self.draft), self.phase, *flags, *pending]

    def cut(self, length: int) -> None:
        """Keeps `length` tokens of the answer."""
        del self.tokens[len(self.prompt) + length :], self.scores[length:]
        starts = accumulate((count for _, count in self.accepted), initial=0)
        steps = list(zip(self.accepted, starts, strict=False))
        self.accepted = [(phase, min(count, length - start)) for (phase, count), start in steps if start < length]

    def spend_noise(self, tokens: int) -> None:
        """So many positions have got their tokens; what is left is for the next ones, as long as a draft is verified.
        A row that leaves a label puts its own generator back behind what was spent: how much lay ready depends on the
        drafts, and so on whether a step was done again after running out of memory."""
        if self.phase == Phase.VERIFIED and not self.finish_reason:
            del self.noise[:tokens]
            return
        if self.generator is not None and tokens < len(self.noise):
            self.generator.set_state(self.noise[tokens - 1][1])
        self.noise = []

    def fail(self, fault: int) -> None:
        """Ends the row at a step whose numbers gave no tokens."""
        what = "the model's logits are NaN or infinite"
        if fault != MODEL:
            names = ", ".join(type(processor).__name__ for processor in self.processors)
            what = f"its logits processors ({names}) made NaN, +inf or nothing but -inf of the model's finite logits"
        self.error = f"row {self.index}: {what} at token {len(self.answer)} of its answer"
        if fault == MODEL and self.sound is not None and not self.sound:
            self.error += "; its image features were not finite when it entered"
        self.finish_reason, self.noise = "error", []


class GenerationLoop:
    """Decodes rows to their ends.

    Args:
        model: the drop-in. features: image features on demand (`PromptFeatures`).
        slots: rows decoded at a time; further rows wait and take the slots of finished ones.
        stops: ids that end a row, and its answer, wherever they are accepted.
        criteria: asked after every accepted token, row by row. One with a method `answer_to_keep`, as
            `DegenerateAnswerCriteria` has, is asked that for the answer's ids at each `</box>`, and the rest is cut.
        streamer: gets the only row's prompt and tokens.
        generator: draws for every row that has none of its own; None is the global one.
        device: where ids live and rules run. graphs: whether to capture decode steps as CUDA graphs.
    """

    def __init__(
        self,
        model: Any,
        features: Any,
        rows: list[Row],
        roles: TokenRoles,
        *,
        slots: int,
        stops: frozenset[int],
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        generator: torch.Generator | None,
        device: torch.device,
        graphs: bool = False,
    ):
        self.model, self.features, self.roles, self.stops, self.streamer = model, features, roles, stops, streamer
        self.rows, self.waiting = rows, deque(rows)
        self.active: list[Row] = []  # by slot
        self.cutting = [one for one in criteria if hasattr(one, "answer_to_keep")]
        self.criteria = StoppingCriteriaList([one for one in criteria if not hasattr(one, "answer_to_keep")])
        self.asks = bool(stops or criteria)  # whether anybody ends rows but the rules
        self.device, self.graphs, self.packed = device, graphs, packs(device) and not graphs
        self.slots, self.capacity = min(slots, len(rows)), max(row.room for row in rows) + 1
        self.prefill_tokens = PREFILL_TOKENS
        # Places behind a row's tokens and draft repeat its first one, so that penalties see no token it lacks.
        self.tokens = torch.zeros(self.slots, self.capacity + WINDOW, dtype=torch.long, device=device)
        self.state = torch.zeros(self.slots, State.WIDTH, dtype=torch.long, device=device)
        ends = [roles.end, roles.null, *stops]
        self.sampler = Sampler(self.tokens, self.state[:, State.COMMITTED], ends, generator)
        self.empty_cache()

    def run(self) -> list[Row]:
        """Decodes all rows; returns them, finished."""
        try:
            if self.streamer is not None:
                self.streamer.put(torch.tensor(self.rows[0].prompt))
            while self.active or self.waiting:
                self.step()
            if self.streamer is not None:
                self.streamer.end()
        finally:
            self.close()
        return self.rows

    def step(self) -> None:
        rewind = self.sampler.rewinder([])
        try:
            rows = self.schedule()
            rewind = self.sampler.rewinder(rows)
            decided = self.decide(rows, self.forward()) if rows else []
        except torch.OutOfMemoryError as error:
            self.halve(error)
            rewind()
            return
        # not tried again: a row's draw is spent once the row beside it, a criterion or a streamer has its own
        for row, told in zip(rows, decided, strict=True):
            self.postprocess(row, *told)

    # ---- memory

    def empty_cache(self) -> None:
        self.cache = SlotKVCache(self.slots, self.capacity)
        self.residents: dict[int, np.ndarray] = {}  # contents of the prompts that slots hold
        self.written = [0] * self.slots  # how far the last row of a slot wrote
        self.run_step: Callable[..., torch.Tensor] = self.compute
        if self.graphs:  # they hold the addresses of this cache
            self.run_step = DecodeGraphs(self.compute, slots=self.slots, capacity=self.capacity)

    def close(self) -> None:
        """Gives the memory back now: a traceback may outlive the call, and the loop's parts refer to each other."""
        self.cache.layers.clear()
        del self.cache, self.run_step, self.sampler

    def halve(self, error: torch.OutOfMemoryError) -> None:
        """Goes on with half the slots and half the prompt tokens and patches a pass. Unfinished rows wait again, with
        the tokens they have; what they had cached is computed anew."""
        if self.slots == 1 and self.prefill_tokens <= LEAST_PREFILL_TOKENS:
            raise error
        logger.warning_once(f"out of memory with {self.slots} rows at a time; going on with half of it")
        self.slots = max(1, self.slots // 2)
        self.prefill_tokens = max(LEAST_PREFILL_TOKENS, self.prefill_tokens // 2)
        self.features.halve()
        self.waiting.extendleft(reversed([row for row in self.active if not row.finish_reason]))
        for row in self.waiting:
            row.cached, row.draft = 0, []
        self.active = []
        self.empty_cache()
        torch.cuda.empty_cache()  # nothing, where CUDA was never used

    # ---- schedule

    def schedule(self) -> list[Row]:
        """Rows enter and leave; the device gets their state. Returns the active rows, those of one phase side by side,
        and in it those of one kind (`Sampler.kind`)."""
        self.admit()
        kinds: dict[tuple, list[int]] = {}
        for slot, row in enumerate(self.active):
            kinds.setdefault((row.phase, *Sampler.kind(row)), []).append(slot)
        order = [slot for _, slots in sorted(kinds.items(), key=lambda kind: kind[0][:2]) for slot in slots]
        state = [[slot, *row.state] for slot, row in zip(order, self.active, strict=True)]
        self.state.copy_(torch.tensor(state + [State.empty()] * (len(self.state) - len(state))))
        return [self.active[slot] for slot in order]

    def admit(self) -> None:
        """Finished rows leave; waiting rows take their slots; without any, the last active rows close the gaps."""
        entering: dict[int, Row] = {}
        free = [slot for slot, row in enumerate(self.active) if row.finish_reason]
        for slot in free:
            self.written[slot] = self.active[slot].cached + 2 * WINDOW  # a window behind at most six pending tokens
        free += range(len(self.active), self.slots)
        for slot in free[: len(self.waiting)]:
            entering[slot] = self.waiting.popleft()
            self.active[slot : slot + 1] = [entering[slot]]
        for slot in free[len(entering) :]:
            while self.active and self.active[-1].finish_reason:
                self.active.pop()
            if slot < len(self.active):
                last = self.active[slot] = self.active.pop()
                source = len(self.active)
                self.cache.move(source, slot, last.cached)
                self.cache.clear(slot, last.cached, self.written[slot])
                self.residents[slot], self.tokens[slot] = self.residents.pop(source), self.tokens[source]
        if entering:
            self.enter(entering)

    def enter(self, entering: dict[int, Row]) -> None:
        """Caches all but the last token of entering rows; that one is pending in their first step."""
        contents = {}
        for slot, row in entering.items():
            contents[slot] = content_of(row.tokens[:-1], self.roles.image, *self.features.layout(row.index))
            self.tokens[slot] = row.tokens[0]
            self.tokens[slot, : row.committed] = torch.tensor(row.tokens, device=self.device)
        for planned in share_prefixes(contents, self.residents):
            chunks = self.sound(planned)
            for chunk in chunks:
                kept = chunk.start if chunk.donor == chunk.slot else 0
                self.cache.clear(chunk.slot, kept, self.written[chunk.slot])
                if chunk.start > kept:
                    self.cache.move(chunk.donor, chunk.slot, chunk.start)
            for group in in_passes([chunk for chunk in chunks if chunk.start < chunk.stop], self.prefill_tokens):
                self.prefill(group, contents)
        for slot, row in entering.items():
            row.cached = row.committed - 1
            self.residents[slot] = contents[slot]
            self.features.release(row.index)

    def sound(self, planned: list[PromptChunk]) -> list[PromptChunk]:
        """Chunks that share finite numbers only; the others are computed whole. NaN in one picture spreads to tokens
        before it: 0 × NaN, under the causal mask."""
        chunks: dict[int, PromptChunk] = {}
        for chunk in planned:
            anew = chunk.donor in chunks and not chunks[chunk.donor].start  # the donor will not hold it any more
            if chunk.start and (anew or not self.cache.is_finite(chunk.donor, chunk.start)):
                chunk = PromptChunk(chunk.slot, 0, chunk.stop)
            chunks[chunk.slot] = chunk
        return list(chunks.values())

    def prefill(self, chunks: list[PromptChunk], contents: dict[int, np.ndarray]) -> None:
        """One packed pass over what of these rows' prompts is not shared."""
        rows = [self.active[chunk.slot] for chunk in chunks]
        # not every image token: in an answer that is cached again, after out of memory, it is a word
        images = [contents[chunk.slot] < 0 for chunk in chunks]
        # those before a chunk are cached already, and their features not needed
        skipped = [int(each[: chunk.start].sum()) for each, chunk in zip(images, chunks, strict=True)]
        features = self.features.take([(row.index, skip) for row, skip in zip(rows, skipped, strict=True)])
        own = [each[chunk.start :] for each, chunk in zip(images, chunks, strict=True)]
        shown = torch.from_numpy(np.concatenate(own)).to(self.device)
        step = PrefillStep(chunks, self.device)
        embeddings = self.model.embed_prompt(self.tokens[step.slots, step.offsets], features, shown)
        # asked for only if the row fails
        finite = embeddings.isfinite().all(-1) | ~shown.to(embeddings.device)
        for row, sound in zip(rows, finite.split(step.lengths), strict=True):
            row.sound = sound.all()
        self.model.decode(embeddings, step, self.cache)

    # ---- forward

    def forward(self) -> torch.Tensor:
        """One pass of the decoder over the active rows: `[R, Q, hidden]`, by slot, in the grid of a `DecodeStep`."""
        windows = any(row.phase != Phase.AR for row in self.active)
        pending = [len(row.pending) for row in self.active]
        longest = max(row.cached + fed for row, fed in zip(self.active, pending, strict=True)) + WINDOW * windows
        with torch.cuda.device_of(self.state):  # a graph is captured and replayed on the current device
            return self.run_step(len(pending), max(pending), windows, longest)

    def compute(self, rows: int, pending: int, windows: bool, longest: int) -> torch.Tensor:
        """The pass itself, a function of the state on the device and of these shapes only: CUDA graphs capture it."""
        state = self.state[:rows]
        place = state[:, State.CACHED, None] + torch.arange(WINDOW, device=self.device)
        self.tokens[:rows].scatter_(1, place, state[:, State.PENDING :])
        step = DecodeStep(state, pending=pending, windows=windows, longest=longest, packed=self.packed)
        ids = self.tokens[step.slots, step.positions.squeeze(0)].masked_fill(step.masked, self.roles.mask)
        hidden = self.model.decode(self.model.embed_prompt(ids, []), step, self.cache)
        return step.to_grid(hidden.to(self.device))

    # ---- decide

    def decide(self, rows: list[Row], hidden: torch.Tensor) -> list[tuple[list[int], list[float]]]:
        """The decoding rules, phase by phase. Returns of each row what `accept` tells: numbers, log-probabilities."""
        groups = [list(group) for _, group in groupby(rows, lambda row: row.phase)]
        slots = self.state[: len(rows), State.ORDER].split([len(group) for group in groups])
        read = [self.read(hidden, group, at) for group, at in zip(groups, slots, strict=True)]
        # one call of the head, which reads more weights than a layer
        logits = self.model.logits(torch.cat([lines.flatten(0, 1) for lines in read])).to(self.device, torch.float32)
        parts = logits.split([lines.shape[0] * lines.shape[1] for lines in read])
        parts = [part.unflatten(0, lines.shape[:2]) for part, lines in zip(parts, read, strict=True)]
        told = torch.cat([self.accept(*each) for each in zip(parts, groups, slots, strict=True)]).cpu()
        scores = told[:, -WINDOW:].int().view(torch.float32)
        return list(zip(told[:, :-WINDOW].tolist(), scores.tolist(), strict=True))

    def read(self, hidden: torch.Tensor, rows: list[Row], slots: torch.Tensor) -> torch.Tensor:
        """`[R, lines, hidden]`, what the rules of these rows' phase read: the window, or behind the last committed
        token and each of the draft, or (a draft) both, one after the other."""
        if rows[0].phase == Phase.MTP:
            return hidden[slots, -WINDOW:]
        last = self.state[slots, State.COMMITTED] - self.state[slots, State.CACHED] - 1
        column = last[:, None] + torch.arange(1 + max(len(row.draft) for row in rows), device=self.device)
        causal = hidden[slots[:, None], column.clamp(max=hidden.shape[1] - 1)]
        return causal if rows[0].phase == Phase.AR else torch.cat([causal, hidden[slots, -WINDOW:]], 1)

    def accept(self, logits: torch.Tensor, rows: list[Row], slots: torch.Tensor) -> torch.Tensor:
        """`[R, lines, V]` of rows of one phase → `[R, 22]` long: 11 tokens, how many of them are accepted, how many
        drafted, the next phase, whether the row is finished, the fault of one that accepts nothing (sampling.py), and
        the bits of six log-probabilities: the accepted tokens', under the distributions they were accepted from."""
        hybrid, labels = (self.state[slots, column].bool() for column in (State.HYBRID, State.LABELS))
        by_label = any(row.settings.verify_labels for row in rows)
        if rows[0].phase == Phase.VERIFIED:
            lines = logits[:, :-WINDOW], logits[:, -WINDOW:]
            probabilities, chosen, faults, window, candidates = self.sampler.choose_verified(*lines, rows, slots)
            committed, drafted = self.state[slots, State.COMMITTED], self.state[slots, State.DRAFTED]
            place = committed[:, None] + torch.arange(chosen.shape[1] - 1, device=self.device)
            # a fault behind tokens of a draft comes to light once they are committed
            sound = (faults == 0).long().cumprod(-1).sum(-1)
            tokens = window_tokens(window, candidates, torch.zeros_like(hybrid), self.roles)
            accepted = verify(chosen, self.tokens[slots].gather(1, place), drafted, tokens, sound, self.roles)
            accepted, faults = leave_label(accepted, labels, self.roles) if by_label else accepted, faults[:, 0]
        else:
            probabilities, tokens, faults = self.sampler.choose(logits, rows, slots)
            if rows[0].phase == Phase.AR:
                accepted = accept_next(tokens[:, 0], hybrid, self.roles)
            else:
                tokens = window_tokens(probabilities, tokens, hybrid, self.roles)
                accepted = accept_window(tokens, hybrid, self.roles)
                accepted = verify_label(accepted, labels, self.roles) if by_label else accepted
        tokens, *numbers = accepted
        scores = probabilities.gather(-1, tokens[:, : probabilities.shape[1], None]).squeeze(-1).log()
        tokens, scores = (F.pad(x, (0, n - x.shape[1])) for x, n in ((tokens, 2 * WINDOW - 1), (scores, WINDOW)))
        return torch.cat([tokens, torch.stack([*numbers, faults], 1), scores.view(torch.int32)], 1)

    # ---- postprocess

    def postprocess(self, row: Row, line: list[int], scores: list[float]) -> None:
        """A step's tokens join the row, up to the first that ends it by the caller's stops or criteria, and the
        streamer hears of them; its draft waits for the next step."""
        *tokens, length, drafted, phase, finished, fault = line
        before, keep = row.committed, None
        row.forwards += 1
        if fault:
            row.accepted.append((row.phase, 0))
            row.fail(fault)
            return
        for token in tokens[:length]:
            row.tokens.append(token)
            keep = self.asked(row) if self.asks else None
            if row.finish_reason:
                break
        count = row.committed - before
        if finished and count == length:
            row.finish_reason = "end"
        elif not row.finish_reason and row.committed >= row.settings.limit:
            row.finish_reason = "limit"
        row.accepted.append((row.phase, count))
        row.scores += scores[:count]
        row.switches += phase == Phase.AR != row.phase
        # what was verified has been fed, but for the last token; what a window said has not
        row.cached = before + (length - 1 if row.phase == Phase.VERIFIED else 0)
        # a draft that reached the limit would have no place in the cache
        row.draft = tokens[length : min(length + drafted, row.settings.limit - before - 1)]
        row.phase = Phase(phase)
        row.spend_noise(count)
        if keep is not None:
            row.cut(keep)
        if self.streamer is not None:
            self.streamer.put(torch.tensor(row.tokens[before:]))

    def asked(self, row: Row) -> int | None:
        """Whether the caller's stops or criteria end a row at its last token: it then has a reason. Returns how many
        tokens of the answer to keep, if not all."""
        token, keep = row.tokens[-1], None
        stops = token in self.stops and row.committed > row.settings.least
        if stops or (self.criteria and self.criteria(torch.tensor([row.tokens], device=self.device), None).any()):
            row.finish_reason = "stop"
        if self.cutting and token == self.roles.box_end:
            answer = row.answer
            keep = next((kept for one in self.cutting if (kept := one.answer_to_keep(answer)) is not None), None)
            row.finish_reason = row.finish_reason if keep is None else "repetition"
        return keep
