# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The engine: rows join at any time, enter slots, take steps together, and leave when they finish.

A step: admit (rows take slots), enter (prompts are cached as far as the step's budgets go), a step of the model runner
(one pass over the rows' pending tokens and windows, and the rules), postprocess (tokens join their rows). Rows differ
in everything: prompt, images, mode, limit, sampling parameters, accepted tokens, finish.
"""

import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .configuration import WINDOW, TokenRoles
from .decoding import Phase
from .kv_cache import PromptChunk, content_of, in_passes, share_prefixes
from .model_runner import INVARIANT_ROWS, ModelRunner
from .rows import Picture, Row

PREFILL_TOKENS = 8192  # prompt tokens in one prefill pass, at most (one chunk at least)
CPU_PREFILL_TOKENS = 640  # fresh pages again (see vision.py): by int8, 2,400 cost 60% more a token
LEAST_PREFILL_TOKENS = 64  # less is not tried after running out of memory
KEPT_PLACES = 8192  # of the cache, a slot: one with more, for rows that are rarely so long, goes with them
ANSWER_PLACES = 256  # of the cache, made ready behind a prompt: most answers are shorter than their limit

logger = logging.get_logger(__name__)


class GenerationLoop:
    """Decodes rows to their ends.

    Args:
        model: the drop-in. pictures: the image features of its rows, on demand (inputs.py's `Pictures`).
        slots: rows decoded at a time; further rows wait and take the slots of finished ones.
        capacity: the most places that a row can come to need (`Row.room`).
        generator: draws for every row that has none of its own; None is the global one.
        device: where ids live and rules run. decode_graphs, compile: see `generate`.
        share_prefixes: whether a row copies from another's slot what their prompts begin with.
        batch_invariant: whether a row is computed in shapes that follow from the row alone: its pictures and its
            prompt in passes of their own, whole, and its steps as `ModelRunner` says, at most 16 rows at a time.
        step_tokens, step_patches: prompt tokens to cache and patches to encode in one step, at most (one picture at
            least), so that rows which decode do not wait long for those that enter. A picture cannot be split.
    """

    def __init__(
        self,
        model: Any,
        pictures: Any,
        roles: TokenRoles,
        *,
        slots: int,
        capacity: int,
        device: torch.device,
        generator: torch.Generator | None = None,
        decode_graphs: bool | None = None,
        compile: bool = False,
        share_prefixes: bool = True,
        batch_invariant: bool = False,
        step_tokens: int = sys.maxsize,
        step_patches: int = sys.maxsize,
    ):
        self.pass_tokens = CPU_PREFILL_TOKENS if device.type == "cpu" else PREFILL_TOKENS
        if batch_invariant:
            slots, share_prefixes, step_tokens, self.pass_tokens = min(slots, INVARIANT_ROWS), False, sys.maxsize, 1
            pictures.patches_a_pass = 1
        self.pictures, self.roles = pictures, roles
        self.waiting: deque[Row] = deque()
        self.active: dict[int, Row] = {}  # by slot, in the order they came
        self.slots, self.share_prefixes, self.device = slots, share_prefixes, device
        self.step_tokens, self.step_patches = step_tokens, step_patches
        self.limits = slots, self.pass_tokens, pictures.patches_a_pass  # which `halve` goes below
        graphs = decode_graphs is not False
        self.runner = ModelRunner(
            *(model, roles, device, slots, capacity, generator),
            graphs=graphs,
            compile=compile,
            invariant=batch_invariant,
        )
        self.residents: dict[int, np.ndarray] = {}  # contents of the prompts that slots hold, or will when cached
        self.written: dict[int, int] = {}  # how far the last row of a slot wrote

    # ---- rows in, steps, rows out

    @property
    def busy(self) -> bool:
        return bool(self.active or self.waiting)

    def add(self, row: Row) -> None:
        """A row joins: it waits for a slot."""
        if row.streamer is not None:
            row.streamer.put(torch.tensor(row.prompt))
        self.pictures.join(row)
        self.waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Ends a row, wherever it is, with the tokens it has."""
        if row.finish_reason is None:
            row.finish_reason, row.noise = "cancelled", []
            if row in self.waiting:
                self.waiting.remove(row)
                self.pictures.release(row)
            self.leave()
            if not self.busy:
                self.rest()

    def step(self) -> list[Row]:
        """One step of all rows that have a slot. Returns those that finished in it, with an error or without."""
        rewind = self.runner.sampler.rewinder([])
        try:
            self.admit()
            self.enter()
            decoding = [row for row in self.active.values() if row.entered]
            rewind = self.runner.sampler.rewinder(decoding)
            decided = self.runner.step(self.active) if decoding else []
        except torch.OutOfMemoryError as error:
            rewind()
            return self.halve(error)
        # not tried again: a row's draw is spent once the row beside it, a criterion or a streamer has its own
        for row, line, scores in decided:
            try:
                self.postprocess(row, line, scores)
                if row.finish_reason and row.streamer is not None:
                    row.streamer.end()
            except Exception as error:  # of the caller's criteria or streamer
                row.fail(f"{type(error).__name__}: {error}", error)
        return self.leave()

    def run(self, rows: list[Row]) -> list[Row]:
        """Decodes rows to their ends; returns them, finished.

        Raises:
            Exception: what a processor, a criterion or a streamer of the caller's raised.
        """
        try:
            for row in rows:
                self.add(row)
            while self.busy:
                for row in self.step():
                    if row.raised is not None:
                        raise row.raised
        finally:
            self.close()
        return rows

    def close(self) -> None:
        self.runner.close()

    # ---- memory

    def halve(self, error: torch.OutOfMemoryError) -> list[Row]:
        """Goes on with half the slots and half the prompt tokens and patches a pass. Unfinished rows wait again, with
        the tokens they have; what they had cached is computed anew. Where nothing is left to halve, the row ends."""
        rows = list(self.active.values())
        if self.slots == 1 and self.pass_tokens <= LEAST_PREFILL_TOKENS:
            for row in rows:
                row.fail(f"{type(error).__name__}: {error}", error)
        else:
            logger.warning_once(f"out of memory with {self.slots} rows at a time; going on with half of it")
            self.slots = max(1, self.slots // 2)
            self.pass_tokens = min(self.pass_tokens, max(LEAST_PREFILL_TOKENS, self.pass_tokens // 2))
            self.pictures.halve()
        failed = self.leave()
        for row in self.active.values():
            if row.entered:
                self.pictures.join(row)
            row.leave_memory()
        self.waiting.extendleft(reversed(self.active.values()))
        self.active = {}
        self.empty_cache()
        return failed

    def empty_cache(self) -> None:
        self.runner.empty_cache()
        self.residents, self.written = {}, {}

    def rest(self) -> None:
        """No row is left: what was halved is tried whole again, and a cache that few rows need is given back."""
        self.slots, self.pass_tokens, self.pictures.patches_a_pass = self.limits
        if self.runner.cache.places > KEPT_PLACES:
            self.empty_cache()

    # ---- schedule

    def admit(self) -> None:
        """Waiting rows take free slots; where none waits, the last rows close the gaps. No more are admitted than a
        step's budget may cache: the others lose nothing by waiting where they can still be cancelled for nothing."""
        room = self.step_tokens - sum(len(row.content) - row.cached for row in self.active.values() if not row.entered)
        taken: dict[int, Row] = {}
        for slot in range(self.slots):
            if slot in self.active or not self.waiting or room <= 0:
                continue
            row = self.active[slot] = taken[slot] = self.waiting.popleft()
            images = [picture.number for picture in row.pictures], [picture.tokens for picture in row.pictures]
            row.content = content_of(row.tokens[:-1], self.roles.image, *images)
            room -= row.committed
        if taken:
            self.runner.write_tokens(taken)
        if self.waiting:
            return
        for slot in range(len(self.active)):
            if slot not in self.active:
                self.move(max(self.active), slot)

    def move(self, source: int, target: int) -> None:
        """A row goes on in a free slot; what it leaves is there until somebody enters."""
        row = self.active[target] = self.active.pop(source)
        self.runner.move(source, target, row.cached)
        if row.cached or row.entered:
            self.runner.cache.clear(target, row.cached, self.written.get(target, 0))
            self.residents[target] = self.residents[source]
            self.vacate(source, row)

    def leave(self) -> list[Row]:
        """Finished rows leave their slots; returns them."""
        left = {slot: row for slot, row in self.active.items() if row.finish_reason}
        for slot, row in left.items():
            del self.active[slot]
            self.vacate(slot, row)
            if not row.entered:
                self.pictures.release(row)
        if left and not self.busy:
            self.rest()
        return list(left.values())

    def vacate(self, slot: int, row: Row) -> None:
        """What a row's slot still holds, for whoever enters it or begins alike."""
        if row.cached or row.entered:
            self.written[slot] = row.cached + 2 * WINDOW  # a window behind at most six pending tokens
            self.residents[slot] = row.content[: row.cached]

    def enter(self) -> None:
        """Caches all but the last token of rows that enter, as far as a step's budgets go; that one is pending in
        their first step."""
        entering = {slot: row for slot, row in self.active.items() if not row.entered}
        if not entering:
            return
        places = max(min(row.room, row.committed + ANSWER_PLACES) for row in entering.values())
        self.runner.reserve(max(self.active), places)
        self.tokens_left, self.patches_left = self.step_tokens, self.step_patches
        chosen: set[Picture] = set()  # to be encoded in this step
        begun = [PromptChunk(slot, row.cached, len(row.content), slot) for slot, row in entering.items() if row.cached]
        fresh = {slot: row.content for slot, row in entering.items() if not row.cached}
        for planned in self.plan(begun, fresh):
            chunks = []
            for chunk in self.sound(planned):
                if (piece := self.piece(chunk, chosen)) is not None:
                    self.begin(piece)
                    chunks.append(piece)
            for group in in_passes([chunk for chunk in chunks if chunk.start < chunk.stop], self.pass_tokens):
                self.prefill(group)
            for chunk in chunks:
                row = entering[chunk.slot]
                row.cached, row.entered = chunk.stop, chunk.stop == len(row.content)
                if row.entered:
                    self.pictures.release(row)

    def plan(
        self, begun: list[PromptChunk], fresh: dict[int, np.ndarray]
    ) -> tuple[list[PromptChunk], list[PromptChunk]]:
        """What can be computed at once, and what then, for it copies what others have computed."""
        if not self.share_prefixes:
            return begun + [PromptChunk(slot, 0, len(content)) for slot, content in fresh.items()], []
        first, second = share_prefixes(fresh, self.residents)
        return begun + first, second

    def sound(self, planned: list[PromptChunk]) -> Iterator[PromptChunk]:
        """Chunks that share finite numbers only; the others are computed whole. NaN in one picture spreads to tokens
        before it: 0 × NaN, under the causal mask. Those whose donor is not as far yet are left for another step."""
        anew = set()
        fresh = [chunk for chunk in planned if chunk.start and not self.active[chunk.slot].cached]
        finite = self.runner.cache.are_finite({(chunk.donor, chunk.start) for chunk in fresh})
        for chunk in planned:
            if chunk in fresh:
                donor = self.active.get(chunk.donor)
                if chunk.donor != chunk.slot and donor is not None and donor.cached < chunk.start:
                    continue
                if chunk.donor in anew or not finite[chunk.donor, chunk.start]:
                    chunk = PromptChunk(chunk.slot, 0, chunk.stop)
                    anew.add(chunk.slot)  # which does not hold what it held any more
            yield chunk

    def piece(self, chunk: PromptChunk, chosen: set[Picture]) -> PromptChunk | None:
        """What of a chunk the budgets hold: up to a picture that is more than is left of them, if others were taken
        before it; it is then the first of the next step."""
        row = self.active[chunk.slot]
        if self.tokens_left <= 0:
            return None
        stop = min(chunk.stop, chunk.start + self.tokens_left)
        shown = row.features(chunk.start, stop)
        for picture, _ in shown:
            if picture.cost and picture not in chosen:
                if self.patches_left < min(picture.cost, self.step_patches):
                    self.patches_left = 0
                    if picture is shown[0][0]:  # text alone is not worth a pass
                        return None
                    stop = chunk.start + int(np.argmax(row.content[chunk.start :] == -1 - picture.number))
                    break
                self.patches_left -= picture.cost
                chosen.add(picture)
        self.tokens_left -= stop - chunk.start
        return PromptChunk(chunk.slot, chunk.start, stop, chunk.donor)

    def begin(self, chunk: PromptChunk) -> None:
        """A slot is cleared of its last row, but for what its next one shares, with it or with another slot."""
        row = self.active[chunk.slot]
        if not row.cached:
            kept = chunk.start if chunk.donor == chunk.slot else 0
            self.runner.cache.clear(chunk.slot, kept, self.written.get(chunk.slot, 0))
            if chunk.start > kept:
                self.runner.cache.move(chunk.donor, chunk.slot, chunk.start)
            self.residents[chunk.slot], row.cached = row.content, chunk.start

    def prefill(self, chunks: list[PromptChunk]) -> None:
        """One packed pass over chunks of rows' prompts, behind what their slots hold already."""
        rows = [self.active[chunk.slot] for chunk in chunks]
        fed = [row.features(chunk.start, chunk.stop) for row, chunk in zip(rows, chunks, strict=True)]
        features = self.pictures.take([part for parts in fed for part in parts])
        own = [row.content[chunk.start : chunk.stop] < 0 for row, chunk in zip(rows, chunks, strict=True)]
        sound = self.runner.prefill(chunks, features, torch.from_numpy(np.concatenate(own)))
        for row, finite in zip(rows, sound, strict=True):  # asked for only if the row fails
            row.sound = finite if row.sound is None else row.sound & finite

    # ---- postprocess

    def postprocess(self, row: Row, line: list[int], scores: list[float]) -> None:
        """A step's tokens join the row, up to the first that ends it by the caller's stops or criteria, and the
        streamer hears of them; its draft waits for the next step."""
        *tokens, length, drafted, phase, finished, fault = line
        if row.raised is not None:  # by a processor
            row.fail(f"{type(row.raised).__name__}: {row.raised}", row.raised)
            return
        before, keep = row.committed, None
        row.forwards += 1
        if fault:
            row.accepted.append((row.phase, 0))
            row.fault(fault)
            return
        asks = bool(row.settings.stops or row.criteria or row.cutting)
        for token in tokens[:length]:
            row.tokens.append(token)
            keep = self.asked(row) if asks else None
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
        if row.streamer is not None:
            row.streamer.put(torch.tensor(row.tokens[before:]))

    def asked(self, row: Row) -> int | None:
        """Whether the caller's stops or criteria end a row at its last token: it then has a reason. Returns how many
        tokens of the answer to keep, if not all."""
        token, keep = row.tokens[-1], None
        stops = token in row.settings.stops and row.committed > row.settings.least
        if stops or (row.criteria and row.criteria(torch.tensor([row.tokens], device=self.device), None).any()):
            row.finish_reason = "stop"
        if row.cutting and token == self.roles.box_end:
            answer = row.answer
            keep = next((kept for one in row.cutting if (kept := one.answer_to_keep(answer)) is not None), None)
            row.finish_reason = row.finish_reason if keep is None else "repetition"
        return keep
