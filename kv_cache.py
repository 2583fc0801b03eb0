# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The KV cache: one slot per row, written in place; what a forward pass sees of it, and what rows share.

A forward pass is packed: its T tokens of all rows lie side by side, `[1, T, hidden]`, and nothing is padding. A
`PrefillStep` appends chunks of prompts; a `DecodeStep` feeds every row's pending tokens and, but for rows in phase AR,
a window of six after them (docs/stock-behaviour.md §2). A step says where keys and values are written and who sees
what of them. Rows that ask about one picture begin alike: what a slot holds of an
entering row's prompt is copied (`share_prefixes`), and only the rest is computed.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from .attention import Places, Sequences, attend, attend_packed, rotation_tables
from .configuration import WINDOW
from .decoding import Phase

# Keys are attended in multiples of this, so that few shapes occur and masks stay aligned.
KEY_BLOCK = 64

# A copy also costs a pass of its own for the rest, so little is not worth sharing.
WORTH_TOKENS = 16
WORTH_SHARE = 0.25


class State(IntEnum):
    """The columns of what the device knows of each slot's row in a step, `[slots, WIDTH]` long.

    How many tokens the row has, how many of them are cached, how many the draft behind them has; its phase; whether
    its mode is "hybrid", and whether only its labels are verified; and from PENDING on six tokens, those that are not
    cached first. ORDER has nothing to do with the slot: it lists the slots as the rules take them.
    """

    ORDER, COMMITTED, CACHED, DRAFTED, PHASE, HYBRID, LABELS, PENDING = range(8)
    WIDTH = PENDING + WINDOW

    @classmethod
    def empty(cls) -> list[int]:
        """Of a slot without a row: nothing is pending, and there is no window."""
        return [Phase.AR if column == cls.PHASE else 0 for column in range(cls.WIDTH)]


def round_up(n: int, multiple: int = KEY_BLOCK) -> int:
    return -(-n // multiple) * multiple


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of `like`'s dtype and device; on CPU such that memory is taken when it is first written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # numpy asks the system for zeroed pages, torch writes them; a row's limit is mostly far above its answer
    return torch.from_numpy(np.zeros(math.prod(shape) * like.itemsize, np.uint8)).view(like.dtype).view(shape)


class SlotKVCache:
    """Keys and values of rows that enter and leave slots between steps.

    Args:
        slots: rows held at a time. capacity: tokens a slot has room for. Both grow by `reserve`.

    Attributes:
        layers: per layer `[slots, places, 2, kv_heads, head_dim]`, keys and values, made at the layer's first write:
            zeros, for a masked key still meets its value as 0 × value, which must not be NaN. A slot's last place, for
            cells that no row uses, lies behind all that anybody attends to.
        version: how often the layers have moved to new addresses.
    """

    def __init__(self, slots: int, capacity: int):
        self.slots, self.places, self.version = slots, round_up(capacity) + 1, 0
        self.layers: dict[int, torch.Tensor] = {}

    def reserve(self, slots: int, places: int) -> None:
        """Room for as many slots of as many tokens; what is held stays where it was in its slot.

        What has to grow grows by a quarter at least, so that rows that come one by one rarely cause it; layer by
        layer, so that no more than one is held twice.
        """
        if slots > self.slots:
            self.slots, self.version = max(slots, self.slots * 5 // 4), self.version + 1
        if places >= self.places:
            self.places, self.version = round_up(max(places, self.places * 5 // 4)) + 1, self.version + 1
        for index, held in self.layers.items():
            slots, places, *rest = held.shape
            if (slots, places) != (self.slots, self.places):
                self.layers[index] = zeros((self.slots, self.places, *rest), held)
                self.layers[index][:slots, : places - 1] = held[:, :-1]

    def update(self, keys_values: torch.Tensor, layer: int, step: "PrefillStep | DecodeStep") -> torch.Tensor:
        """Writes `[T, 2, kv_heads, head_dim]` where `step` says; returns the layer."""
        if layer not in self.layers:
            self.layers[layer] = zeros((self.slots, self.places, *keys_values.shape[1:]), keys_values)
        self.layers[layer][step.slots, step.offsets] = keys_values
        return self.layers[layer]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` places of slot `source` to slot `target`."""
        if layers := self.layers.values():
            torch._foreach_copy_([x[target, :length] for x in layers], [x[source, :length] for x in layers])

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Zeroes places of a slot, so that nothing of its last row, NaN say, reaches the next one."""
        if self.layers and start < stop:
            torch._foreach_zero_([layer[slot, start:stop] for layer in self.layers.values()])

    def are_finite(self, prefixes: Collection[tuple[int, int]]) -> dict[tuple[int, int], bool]:
        """Whether the first `length` places of each (slot, length) hold numbers only; the device is asked once. NaN in
        a token's pass reaches the last layer."""
        if not prefixes:
            return {}
        *_, last = self.layers.values()
        finite = torch.stack([last[slot, :length].isfinite().all() for slot, length in prefixes])
        return dict(zip(prefixes, finite.tolist(), strict=True))


@dataclass(frozen=True)
class PromptChunk:
    """Tokens `start` … `stop` - 1 of the row in `slot`; the `start` ones before them are copied from slot `donor`."""

    slot: int
    start: int
    stop: int
    donor: int = -1


class Step:
    """What the steps have in common."""

    _tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def rotations(self, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the pass; made once, not in every layer."""
        if self._tables is None:
            self._tables = rotation_tables(*position_embeddings)
        return self._tables


class PrefillStep(Step):
    """Appends chunks of prompts, packed in the given order; attention is causal in each row.

    Attributes:
        slots, offsets: `[T]` long, where each token's keys and values are written.
        positions: `[1, T]` long. lengths: tokens of each chunk.
    """

    def __init__(self, chunks: list[PromptChunk], device: torch.device):
        self.chunks = chunks
        offsets = [place for chunk in chunks for place in range(chunk.start, chunk.stop)]
        slots = [chunk.slot for chunk in chunks for _ in range(chunk.start, chunk.stop)]
        self.slots, self.offsets = torch.tensor([slots, offsets], device=device)
        self.positions = self.offsets.unsqueeze(0)
        self.lengths = [chunk.stop - chunk.start for chunk in chunks]
        self.sequences = Sequences(self.lengths, device)
        self._places: Places | None = None
        self._masks: dict[int, torch.Tensor] = {}

    def to(self, device: torch.device, **kwargs) -> "PrefillStep":
        """accelerate calls this before each layer, which may live on another device."""
        return self if device == self.slots.device else PrefillStep(self.chunks, device)

    def attend(self, module: Any, query: torch.Tensor, keys_values: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        """query: `[T, heads, D]`; keys_values: `[T, 2, kv_heads, D]`, of the same tokens; layer: of the cache. Returns
        `[T, heads, D]`."""
        keys, values, places = *keys_values.unbind(1), None
        if any(chunk.start for chunk in self.chunks):
            keys, values, places = *layer.flatten(0, 1).unbind(1), self.places(layer.shape[1])
        output = attend_packed(
            module, query, keys, values, self.sequences, scaling=module.scaling, causal=True, places=places
        )
        return self.attend_by_chunk(module, query, layer) if output is None else output

    def places(self, room: int) -> Places:
        """Where the keys of all chunks lie in a cache with so many places a slot; made once a step."""
        if self._places is None:
            starts = [chunk.slot * room for chunk in self.chunks]
            stops = [chunk.stop for chunk in self.chunks]
            made = torch.tensor([[*starts, starts[-1] + room], [*stops, 0]], device=self.slots.device).int()
            self._places = Places(made[0], made[1, :-1], max(stops))
        return self._places

    def attend_by_chunk(self, module: Any, query: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        group = query.shape[1] // layer.shape[3]
        parts = zip(self.chunks, query.split(self.lengths), output.split(self.lengths), strict=True)
        for number, (chunk, q, out) in enumerate(parts):
            # a mask is read in aligned pieces, or copied into such first; a CPU's kernel takes any
            length = round_up(chunk.stop) if chunk.start and not layer.is_cpu else chunk.stop
            # [kv_heads, group, L, D], keys and values expanded, not copied, to the query heads
            k, v = layer[chunk.slot, :length].permute(1, 2, 0, 3).unsqueeze(2).expand(-1, -1, group, -1, -1)
            q = q.transpose(0, 1).unflatten(0, (-1, group))
            if chunk.start and number not in self._masks:
                places = torch.arange(length, device=query.device)
                self._masks[number] = places <= places[chunk.start : chunk.stop, None]
            mask = self._masks.get(number)
            attended = attend(module, q, k, v, scaling=module.scaling, causal=mask is None, mask=mask)
            out.copy_(attended.flatten(0, 1).transpose(0, 1))
        return output


class DecodeStep(Step):
    """One decode pass over the rows in slots 0 … R-1: pending tokens, then a window for each row that has one.

    The grid of a step is `[R, Q]`: columns 0 … P-1 hold pending tokens (from the left; a row's draft is pending behind
    its committed tokens), the last six, if any row has one, the window. A window's keys go to the places right after
    the pending tokens, where the next step's pending tokens overwrite them; until then the mask hides them from
    everybody but the window. So it is with a draft's that did not hold.

    Args:
        state: `[R, WIDTH]` long, see `State`. pending: P, at least the most that a row has. windows: whether any has
            one. longest: the largest place written, plus one.
        cells: how many to compute, at least those that rows use, of which they are the first; by default the whole
            grid. Shapes follow from the arguments alone, without a device-to-host copy.

    Attributes:
        slots, offsets, masked: `[T]`, of each fed token: where it is written, and whether the mask token is fed.
        positions: `[1, T]`. visible: `[R, Q, K]` bool.
    """

    def __init__(self, state: torch.Tensor, *, pending: int, windows: bool, longest: int, cells: int | None = None):
        device, rows, width = state.device, len(state), pending + WINDOW * windows
        self.shape = (rows, width)
        n = (state[:, State.COMMITTED] + state[:, State.DRAFTED])[:, None]

        fed = state[:, State.CACHED, None] + torch.arange(pending, device=device)  # [R, P]
        offsets, positions, valid = fed, fed, fed < n
        # Pending token i sees keys 0 … i. A window slot sees 0 … n-2 and the window; never n-1, which slot 0 repeats.
        key = torch.arange(round_up(longest), device=device)
        visible = key <= fed[..., None]
        if windows:
            slot = torch.arange(WINDOW, device=device)
            offsets, positions = torch.cat([offsets, n + slot], 1), torch.cat([positions, n - 1 + slot], 1)
            valid = torch.cat([valid, (state[:, State.PHASE, None] != Phase.AR).expand(-1, WINDOW)], 1)
            window = (key < n - 1) | ((key >= n) & (key < n + WINDOW))
            visible = torch.cat([visible, window[:, None].expand(-1, WINDOW, -1)], 1)
        # A cell nobody uses sees key 0, for a query that sees nothing would be NaN; it writes to its slot's last one
        self.visible = torch.where(valid[..., None], visible, key == 0)
        offsets = torch.where(valid, offsets, -1)
        self._mask: torch.Tensor | None = None

        self.kept = torch.arange(rows * width, device=device)
        if cells is not None and cells < len(self.kept):
            self.kept = (~valid.flatten()).int().argsort(stable=True)[:cells]
        self.slots = self.kept // width
        self.offsets = offsets.flatten()[self.kept]
        self.positions = positions.flatten()[self.kept].unsqueeze(0)
        # window slots 1 … 5 hold the mask token; slot 0 repeats the token at its position
        self.masked = self.kept % width > pending

    def to(self, device: torch.device, **kwargs) -> "DecodeStep":
        """accelerate calls this before each layer, which may live on another device."""
        if device == self.slots.device:
            return self
        moved = copy(self)
        moved._mask = moved._tables = None
        for name in ("visible", "kept", "slots", "offsets", "positions"):
            setattr(moved, name, getattr(self, name).to(device, **kwargs))
        return moved

    def to_grid(self, packed: torch.Tensor) -> torch.Tensor:
        """`[T, …]` → `[R, Q, …]`; cells without a token hold zeros."""
        if len(packed) == self.shape[0] * self.shape[1]:
            return packed.unflatten(0, self.shape)
        grid = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        grid[self.kept] = packed
        return grid.unflatten(0, self.shape)

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        """`[R, Q, …]` → `[T, …]`."""
        cells = grid.flatten(0, 1)
        return cells if len(self.kept) == len(cells) else cells[self.kept]

    def mask(self, dtype: torch.dtype, group: int) -> torch.Tensor:
        """Additive `[R, 1, group * Q, K]`, 0 where visible, for each of a key head's `group` query heads; made once a
        step."""
        if self._mask is None or self._mask.dtype != dtype:
            hidden = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            hidden.masked_fill_(~self.visible, float("-inf"))
            self._mask = hidden.unsqueeze(1).repeat(1, group, 1, 1).flatten(1, 2).unsqueeze(1)
        return self._mask

    def attend(self, module: Any, query: torch.Tensor, keys_values: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        """query: `[T, heads, D]`; layer: of the cache, which holds `keys_values` too. Returns `[T, heads, D]`.

        The query heads that share a key head are laid side by side as queries of that head, so that K and V are read
        as they lie in the cache.
        """
        (rows, width), length = self.shape, self.visible.shape[-1]
        grouped = self.to_grid(query).unflatten(2, (layer.shape[3], -1)).permute(0, 2, 3, 1, 4)
        group = grouped.shape[2]  # [R, kv_heads, group, Q, D]
        k, v = layer[:rows, :length].permute(2, 0, 3, 1, 4)
        mask = self.mask(query.dtype, group)
        attended = attend(module, grouped.flatten(2, 3), k, v, scaling=module.scaling, causal=False, mask=mask)
        return self.from_grid(attended.unflatten(2, (group, width)).permute(0, 3, 1, 2, 4).flatten(2, 3))


# ---- the prefix cache: what of entering rows' prompts another slot holds already. Pure planning


def content_of(tokens: list[int], image_token: int, images: list[int], lengths: list[int]) -> np.ndarray:
    """`[n]` int64 that is equal where two rows are: token ids, image slots replaced by which image they show.

    Args:
        images: identity of each of the row's images, in order. lengths: image tokens of each.
    """
    content = np.asarray(tokens, dtype=np.int64)
    shown = np.repeat(-1 - np.asarray(images, dtype=np.int64), lengths)
    # an answer that is cached again may hold the image token as a mere word
    content[np.flatnonzero(content == image_token)[: len(shown)]] = shown
    return content


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many elements two arrays share from the start."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def share_prefixes(
    entering: Mapping[int, np.ndarray], residents: Mapping[int, np.ndarray]
) -> tuple[list[PromptChunk], list[PromptChunk]]:
    """Splits entering rows into those computed whole and those that share.

    Args:
        entering: contents of the tokens to be cached, by slot. residents: contents that slots hold now, a slot's
            last row included after it has left.

    Returns:
        (first, second): rows of `second` copy from slots that hold the donor's content once `first` is computed.
    """
    first: list[PromptChunk] = []
    second: list[PromptChunk] = []
    # a resident's slot that somebody enters is overwritten, so it can give to that slot only
    staying = {slot: content for slot, content in residents.items() if slot not in entering}
    computed: dict[int, np.ndarray] = {}
    for slot, content in entering.items():
        donors = {**staying, **computed}
        if slot in residents:
            donors[slot] = residents[slot]
        shared, donor = max(((common_prefix(content, held), giver) for giver, held in donors.items()), default=(0, -1))
        if shared >= WORTH_TOKENS and shared >= WORTH_SHARE * len(content):
            second.append(PromptChunk(slot, shared, len(content), donor))
            if donor == slot:
                computed[slot] = content[:shared]  # stays where it is, so others may copy it too
        else:
            first.append(PromptChunk(slot, 0, len(content)))
            computed[slot] = content
    return first, second


def in_passes(chunks: list[PromptChunk], budget: int) -> Iterator[list[PromptChunk]]:
    """Chunks, by slot, in groups of at most `budget` tokens to compute, one chunk at least."""
    chunks = sorted(chunks, key=lambda chunk: chunk.slot)
    while chunks:
        taken = accumulate(chunk.stop - chunk.start for chunk in chunks)
        count = max(1, sum(tokens <= budget for tokens in taken))
        yield chunks[:count]
        chunks = chunks[count:]
