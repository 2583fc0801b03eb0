# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Passes of the model over the rows in their slots, and the rules on what comes out of them.

A decode step is one copy to the device, the rows' state; a pass of the decoder over their pending tokens and windows;
the rules on its logits; and one copy to the host, what is accepted.
"""

from itertools import chain, groupby, repeat
from typing import Any

import torch
from torch.nn import functional as F

from .configuration import WINDOW, TokenRoles
from .cuda_graphs import Buffers, Shape, keep, release, take
from .decoding import (
    Acceptance,
    Phase,
    accept_either,
    accept_next,
    accept_window,
    leave_label,
    verify,
    verify_label,
    window_tokens,
)
from .kv_cache import KEY_BLOCK, DecodeStep, PrefillStep, PromptChunk, SlotKVCache, State
from .rows import Row
from .sampling import MODEL, Sampler, SamplingParameters

EMPTY = State.empty()[1:]
PLAIN = SamplingParameters()
INVARIANT_ROWS = 16  # of every batch-invariant pass: so few tokens take hardly longer than the weights take to be read


def packs(device: torch.device) -> bool:
    """Whether steps leave unused cells out, and rules rows of other phases: on CPU arithmetic is what costs, elsewhere
    kernels."""
    return device.type == "cpu"


def compile_layers(decoder: Any) -> None:
    """Each layer, but for its attention over slots, as few kernels as torch.compile makes of it; of any number of
    tokens, so that few are compiled."""
    for layer in decoder.layers:
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True)


class ModelRunner:
    """Computes for rows in slots.

    Args:
        model: the drop-in. device: where ids live and rules run. slots: rows at a time. capacity: the most places that
            a row can come to need. generator: draws for every row that has none of its own; None is the global one.
        graphs: whether to capture decode steps as CUDA graphs, where that can be done. compile: the decoder's layers.
        invariant: whether a row's steps are computed in shapes that follow from the row alone.

    Attributes:
        cache: of the slots. tokens: `[slots, places]` long, each row's committed tokens and draft; behind them its
            first one repeated, so that penalties see no token it lacks. state: `[slots, WIDTH]` long, see `State`.
    """

    def __init__(
        self,
        model: Any,
        roles: TokenRoles,
        device: torch.device,
        slots: int,
        capacity: int,
        generator: torch.Generator | None,
        *,
        graphs: bool,
        compile: bool,
        invariant: bool = False,
    ):
        self.model, self.roles, self.device, self.invariant = model, roles, device, invariant
        if compile:
            compile_layers(model.get_decoder())
        self.graphs = take(model, device) if graphs else None
        self.packs = packs(device) and self.graphs is None and not invariant
        slots = INVARIANT_ROWS if invariant else slots
        shape = slots, capacity + 1 + WINDOW
        kept = self.graphs.buffers if self.graphs else None
        if kept is None or kept.tokens.shape[0] < shape[0] or kept.tokens.shape[1] < shape[1]:
            kept = Buffers(
                SlotKVCache(0, 0),
                torch.zeros(shape, dtype=torch.long, device=device),
                torch.zeros(slots, State.WIDTH, dtype=torch.long, device=device),
            )
        self.use(kept)
        for layer in self.cache.layers.values():
            layer.zero_()  # whatever the last call left
        ends = [roles.end, roles.null]
        self.sampler = Sampler(self.tokens, self.state[:, State.COMMITTED], ends, generator)

    # ---- memory

    def use(self, buffers: Buffers) -> None:
        self.cache, self.tokens, self.state = buffers
        if self.graphs and self.graphs.buffers is not buffers:
            self.graphs.place(buffers)

    def reserve(self, slot: int, places: int) -> None:
        """Room in the cache for that many places of each slot up to that one, and some more slots."""
        self.cache.reserve(min(len(self.state), 1 << slot.bit_length()), places)

    def move(self, source: int, target: int, length: int) -> None:
        """What a row has, of it `length` places in the cache, goes to another slot."""
        self.tokens[target] = self.tokens[source]
        if length:
            self.cache.move(source, target, length)

    def empty_cache(self) -> None:
        """After running out of memory: what is kept for other calls goes too."""
        self.use(Buffers(SlotKVCache(0, 0), self.tokens, self.state))
        release()

    def close(self) -> None:
        """Gives the memory back now, or keeps it with the graphs: a traceback may outlive the call."""
        if self.graphs:
            keep(self.model, self.graphs)
        else:
            self.cache.layers.clear()
        del self.cache, self.tokens, self.state, self.graphs, self.sampler

    # ---- prefill

    def write_tokens(self, rows: dict[int, Row]) -> None:
        """The tokens of rows that take slots, in one copy."""
        width = max(row.committed for row in rows.values())
        lines = [[slot, *row.tokens, *row.tokens[:1] * (width - row.committed)] for slot, row in rows.items()]
        slots, tokens = self.on_host(lines).to(self.device, non_blocking=True).split([1, width], 1)
        self.tokens[slots[:, 0]] = tokens[:, :1]
        self.tokens[slots[:, 0], :width] = tokens

    def on_host(self, lines: list[list[int]]) -> torch.Tensor:
        """`[n, width]` long, from where it is copied without waiting for what the device does now."""
        return torch.tensor(lines, pin_memory=self.device.type == "cuda")

    def prefill(self, chunks: list[PromptChunk], features: list[torch.Tensor], shown: torch.Tensor) -> torch.Tensor:
        """One packed pass over chunks of prompts, behind what their slots hold already.

        Args:
            features: `[tokens, hidden]` of each image that chunks show, in order. shown: `[T]` bool, on the host,
                whether a token is one of an image.

        Returns:
            `[chunks]` bool, whether all features that a chunk shows are finite.
        """
        shown = shown.to(self.device)
        step = PrefillStep(chunks, self.device)
        embeddings = self.model.embed_prompt(self.tokens[step.slots, step.offsets], features, shown)
        finite = embeddings.isfinite().all(-1) | ~shown.to(embeddings.device)
        self.model.decode(embeddings, step, self.cache)
        return torch.stack([each.all() for each in finite.split(step.lengths)])

    # ---- decode

    def step(self, active: dict[int, Row]) -> list[tuple[Row, list[int], list[float]]]:
        """One step of the rows, by slot, that have entered; the others are passed over.

        Returns:
            Of each row the numbers that `told` gives, and the log-probabilities of its tokens.
        """
        rows = {slot: row for slot, row in active.items() if row.entered}
        passes: dict[tuple, dict[int, Row]] = {}
        for slot, row in rows.items():
            passes.setdefault(invariant_kind(row) if self.invariant else (), {})[slot] = row
        return [told for some in passes.values() for told in self.step_together(active, some)]

    def step_together(self, active: dict[int, Row], rows: dict[int, Row]) -> list[tuple[Row, list[int], list[float]]]:
        """`step`, of rows that are computed in one pass."""
        order = self.write_state(active, rows)
        shape = self.shape_of(rows)
        self.reserve(max(*active, shape.rows - 1), shape.longest)
        with torch.cuda.device_of(self.state):  # a graph is captured and replayed on the current device
            result = self.graphs.run(self.compute, shape) if self.graphs else self.compute(shape)
        if shape.decides:
            told = result.cpu()[order]
        else:
            size = 1 if self.invariant else len(order)  # of those whose logits are computed together
            parts = zip(range(0, len(order), size), self.state[: len(order), State.ORDER].split(size), strict=True)
            chosen = [rows[slot] for slot in order]
            told = torch.cat([self.decide(chosen[at : at + size], slots, result) for at, slots in parts]).cpu()
        numbers, scores = told[:, :-WINDOW].tolist(), told[:, -WINDOW:].int().view(torch.float32).tolist()
        return list(zip((rows[slot] for slot in order), numbers, scores, strict=True))

    def shape_of(self, rows: dict[int, Row]) -> Shape:
        """What a pass over these rows is computed in."""
        decides = not self.packs and all(map(is_plain, rows.values()))
        if self.invariant:
            longest, _ = invariant_kind(next(iter(rows.values())))
            shape = Shape(INVARIANT_ROWS, WINDOW, True, longest, 0, decides)
            return shape._replace(cells=shape.grid)
        windows = any(row.phase != Phase.AR for row in rows.values())
        pending = [len(row.pending) for row in rows.values()]
        longest = max(row.cached + fed for row, fed in zip(rows.values(), pending, strict=True)) + WINDOW * windows
        used = sum(pending) + WINDOW * sum(row.phase != Phase.AR for row in rows.values())
        shape = Shape(max(rows) + 1, max(pending), windows, longest, used, decides)
        return shape if self.packs or self.graphs else shape._replace(cells=shape.grid)

    def write_state(self, active: dict[int, Row], rows: dict[int, Row]) -> list[int]:
        """The device gets the rows' state. Returns the slots of `rows`, those of one phase side by side, and in it
        those of one kind (`Sampler.kind`)."""
        kinds: dict[tuple, list[int]] = {}
        for slot, row in sorted(rows.items()):
            kinds.setdefault((row.phase, *Sampler.kind(row)), []).append(slot)
        order = [slot for _, slots in sorted(kinds.items(), key=lambda kind: kind[0][:2]) for slot in slots]
        states = [EMPTY] * len(self.state)
        for slot, row in active.items():
            states[slot] = row.state if slot in rows else row.idle
        lines = [[taken, *columns] for taken, columns in zip(chain(order, repeat(0)), states, strict=False)]
        self.state.copy_(self.on_host(lines), non_blocking=True)
        return order

    def compute(self, shape: Shape) -> torch.Tensor:
        """A pass over the first slots, a function of what is on the device and of the shape only: CUDA graphs capture
        it. `[R, Q, hidden]`, in the grid of a `DecodeStep`, or what `told` gives if the step decides."""
        rows, pending, windows, longest, cells, decides = shape
        state = self.state[:rows]
        place = state[:, State.CACHED, None] + torch.arange(WINDOW, device=self.device)
        self.tokens[:rows].scatter_(1, place, state[:, State.PENDING :])
        step = DecodeStep(state, pending=pending, windows=windows, longest=longest, cells=cells)
        ids = self.tokens[step.slots, step.positions.squeeze(0)].masked_fill(step.masked, self.roles.mask)
        hidden = self.model.decode(self.model.embed_prompt(ids, []), step, self.cache)
        hidden = step.to_grid(hidden.to(self.device))
        return self.decide_plain(state, hidden, windows) if decides else hidden

    # ---- decide

    def decide_plain(self, state: torch.Tensor, hidden: torch.Tensor, windows: bool) -> torch.Tensor:
        """The rules where all rows are plain: in every slot both the next token's and the window's, and then the one
        of its row's phase. `[R, Q, hidden]` → `told`."""
        alone, hybrid = state[:, State.PHASE] == Phase.AR, state[:, State.HYBRID].bool()
        column = (state[:, State.COMMITTED] - state[:, State.CACHED] - 1).clamp(min=0)[:, None]
        if windows:
            window = torch.arange(hidden.shape[1] - WINDOW, hidden.shape[1], device=self.device)
            column = torch.where(alone[:, None], column, window)
        lines = hidden.gather(1, column[..., None].expand(-1, -1, hidden.shape[2]))
        probabilities = self.logits(lines).softmax(-1)
        tokens = probabilities.argmax(-1)
        if windows:
            accepted = accept_either(probabilities, tokens, alone, hybrid, self.roles)
        else:
            accepted = accept_next(tokens[:, 0], hybrid, self.roles)
        return told(accepted, probabilities, probabilities[..., 0].isnan().any(-1) * MODEL)

    def logits(self, lines: torch.Tensor) -> torch.Tensor:
        """`[…, hidden]` → `[…, vocabulary]` float32."""
        return self.model.logits(lines.flatten(0, -2)).to(self.device, torch.float32).unflatten(0, lines.shape[:-1])

    def decide(self, rows: list[Row], slots: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The decoding rules, phase by phase, on rows in the order of the state and their slots, `[R]` long:
        `[R, Q, hidden]` by slot → `told`."""
        groups = [list(group) for _, group in groupby(rows, lambda row: row.phase)]
        places = slots.split([len(group) for group in groups])
        read = [self.read(hidden, *each) for each in zip(groups, places, strict=True)]
        # one call of the head, which reads more weights than a layer
        logits = self.logits(torch.cat([lines.flatten(0, 1) for lines in read]))
        parts = logits.split([lines.shape[0] * lines.shape[1] for lines in read])
        parts = [part.unflatten(0, lines.shape[:2]) for part, lines in zip(parts, read, strict=True)]
        return torch.cat([self.accept(*each) for each in zip(parts, groups, places, strict=True)])

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
        """`[R, lines, V]` of rows of one phase → `told`."""
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
        return told(accepted, probabilities, faults)


def is_plain(row: Row) -> bool:
    """Whether a row's step needs nothing but the rules: greedy, nothing that changes logits, no draft."""
    settings = row.settings
    changed = settings.sampling != PLAIN or row.processors or settings.least > row.committed
    return not (changed or settings.verify_labels or row.phase == Phase.VERIFIED)


def invariant_kind(row: Row) -> tuple[int, bool]:
    """Rows of one kind share a batch-invariant pass: how many keys it attends to, and whether its rules are in it."""
    written = row.cached + len(row.pending) + WINDOW
    return max(KEY_BLOCK, 1 << (written - 1).bit_length()), is_plain(row)


def told(accepted: Acceptance, probabilities: torch.Tensor, faults: torch.Tensor) -> torch.Tensor:
    """`[R, 22]` long: 11 tokens, how many of them are accepted, how many drafted, the next phase, whether the row is
    finished, the fault of one that accepts nothing (sampling.py), and the bits of six log-probabilities: the accepted
    tokens', under the distributions they were accepted from."""
    tokens, *numbers = accepted
    scores = probabilities.gather(-1, tokens[:, : probabilities.shape[1], None]).squeeze(-1).log()
    tokens, scores = (F.pad(x, (0, n - x.shape[1])) for x, n in ((tokens, 2 * WINDOW - 1), (scores, WINDOW)))
    return torch.cat([tokens, torch.stack([*numbers, faults], 1), scores.view(torch.int32)], 1)
