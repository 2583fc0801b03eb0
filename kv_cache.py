# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The KV cache: one slot per row, written in place; and what each token of a forward pass sees of it.

A forward pass is packed: its T tokens of all rows lie side by side, `[1, T, hidden]`, and nothing is padding. A
`PrefillStep` appends stretches of prompts; a `DecodeStep` feeds every row's pending tokens and, but for rows in AR
mode, a window of six after them (decoding.md §2). A step tells the cache where to write and gives the attention its
queries, keys and visibility.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration import WINDOW

# Keys are attended in multiples of this, so that few shapes occur and masks stay aligned.
KEY_BLOCK = 64


def round_up(n: int, multiple: int = KEY_BLOCK) -> int:
    return -(-n // multiple) * multiple


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros of `like`'s dtype and device; on CPU such that memory is taken when it is first written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # numpy asks the system for zeroed pages, torch writes them; a row's limit is mostly far above its answer
    return torch.from_numpy(np.zeros(math.prod(shape) * like.itemsize, np.uint8)).view(like.dtype).view(shape)


class SlotLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, `[slots, kv_heads, capacity, head_dim]`, allocated at the first write."""

    def __init__(self, slots: int, capacity: int):
        super().__init__()
        self.slots, self.capacity = slots, capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        _, heads, _, head_dim = key_states.shape
        # Zeros, not empty: a masked key still meets its value as 0 × value, which must not be NaN. The last place, for
        # cells that no row uses, lies behind all that anybody attends to.
        shape = (self.slots, heads, self.capacity + 1, head_dim)
        self.keys, self.values = zeros(shape, key_states), zeros(shape, key_states)
        self.is_initialized = True

    def update(self, key_states, value_states, step, *args, **kwargs):
        """Writes `[1, kv_heads, T, head_dim]` where `step` says; returns the layer's whole keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        self.keys[step.slots, :, step.offsets] = key_states.squeeze(0).transpose(0, 1)
        self.values[step.slots, :, step.offsets] = value_states.squeeze(0).transpose(0, 1)
        return self.keys, self.values

    def get_seq_length(self, *args) -> int:
        return 0  # rows have lengths of their own, which the loop keeps

    def get_max_length(self) -> int:
        return self.capacity

    def get_max_cache_shape(self) -> int:
        return self.capacity

    def get_mask_sizes(self, *args) -> tuple[int, int]:
        return self.capacity, 0


class SlotKVCache(Cache):
    """A transformers `Cache` whose batch dimension is slots that rows enter and leave between steps.

    Args:
        layers: decoder layers. slots: rows held at a time. capacity: tokens a slot has room for.
    """

    def __init__(self, layers: int, slots: int, capacity: int):
        super().__init__(layers=[SlotLayer(slots, round_up(capacity)) for _ in range(layers)])

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of slot `source` to slot `target`."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def is_finite(self, slot: int, length: int) -> bool:
        """Whether the first `length` places hold numbers only. NaN in a token's pass reaches the last layer."""
        last = self.layers[-1]
        return bool(last.keys[slot, :, :length].isfinite().all() and last.values[slot, :, :length].isfinite().all())

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Zeroes places of a slot, so that nothing of its last row, NaN say, reaches the next one."""
        for layer in self.layers if start < stop else ():
            layer.keys[slot, :, start:stop] = 0
            layer.values[slot, :, start:stop] = 0


@dataclass
class Stretch:
    """Consecutive prompt tokens of one row in a prefill pass: `length` tokens behind the slot's first `cached`."""

    slot: int
    cached: int
    length: int


class PrefillStep:
    """Appends stretches of prompts, packed in the given order; attention is causal in each row.

    Attributes:
        slots, offsets: `[T]` long, where each token's keys and values are written.
        positions: `[1, T]` long.
    """

    def __init__(self, stretches: list[Stretch], device: torch.device):
        self.stretches = stretches
        offsets = [i for s in stretches for i in range(s.cached, s.cached + s.length)]
        slots = [s.slot for s in stretches for _ in range(s.length)]
        self.slots, self.offsets = torch.tensor([slots, offsets], device=device)

    @property
    def positions(self) -> torch.Tensor:
        return self.offsets.unsqueeze(0)

    def to(self, device: torch.device, **kwargs) -> PrefillStep:
        """accelerate calls this before each layer, which may live on another device."""
        return self if device == self.slots.device else PrefillStep(self.stretches, device)

    def pieces(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor):
        """What attends to what: yields (span, q, k, v, mask), the span in packed tokens.

        query: `[1, heads, T, D]`; keys, values: the layer's, `[slots, kv_heads, capacity, D]`. q is
        `[kv_heads, group, L, D]`; k and v `[kv_heads, group, K, D]`, expanded without a copy. mask is None where
        plain causal attention is meant (nothing cached before), else `[L, K]` bool, True = visible.
        """
        grouped = query.squeeze(0).unflatten(0, (keys.shape[1], -1))  # [kv_heads, group, T, D]
        start = 0
        for stretch in self.stretches:
            span = slice(start, start + stretch.length)
            end = stretch.cached + stretch.length
            k, v = (x[stretch.slot, :, :end].unsqueeze(1).expand(-1, grouped.shape[1], -1, -1) for x in (keys, values))
            mask = None
            if stretch.cached:
                reach = torch.arange(stretch.cached, end, device=query.device)
                mask = torch.arange(end, device=query.device) <= reach[:, None]
            yield span, grouped[:, :, span], k, v, mask
            start = span.stop


class DecodeStep:
    """One decode pass over the rows in slots 0 … R-1: pending tokens, then a window for each row that has one.

    The grid of a step is `[R, Q]`: columns 0 … P-1 hold pending tokens (from the left), the last six, if any row has
    one, the window. A row's draft, tokens that are yet to be verified, is pending behind its committed tokens. Logits
    are read at the six places of a window; at the last pending token of a row without one; and where a draft is
    verified, at the last committed token and behind each of the draft too.

    A window's keys go to the places right after the pending tokens, where the next step's pending tokens overwrite
    them; until then the mask hides them from everybody but the window. So it is with a draft's that did not hold.

    Args:
        committed: `[R]` long, tokens of each row (decoding.md's n). cached: `[R]` long, how many the cache holds.
        drafted: `[R]` long, how many follow the committed ones. autoregressive: `[R]` bool, rows without a window.
        verified: `[R]` bool, rows whose logits are also read at pending tokens.
        pending: the largest `committed + drafted - cached`. windows: whether any row has one.
        longest: the largest index written, plus one.
        packed: cells that a row does not use are left out. Otherwise the whole grid is computed and every row has as
            many lines of logits: shapes then follow from the arguments alone, without a device-to-host copy.
        all_lines: if not packed, whether every cell is read; needed where any row is verified.

    Attributes:
        slots, offsets, masked: `[T]`, of each fed token: where it is written, and whether the mask token is fed.
        positions: `[1, T]`. lines: `[N]`, the fed tokens whose logits are read, row by row.
        visible: `[R, Q, K]` bool.
    """

    def __init__(
        self,
        committed: torch.Tensor,
        cached: torch.Tensor,
        drafted: torch.Tensor,
        autoregressive: torch.Tensor,
        verified: torch.Tensor,
        *,
        pending: int,
        windows: bool,
        longest: int,
        packed: bool = True,
        all_lines: bool = False,
    ):
        device = committed.device
        rows = committed.shape[0]
        width = pending + WINDOW * windows
        self.shape = (rows, width)
        n, c = (committed + drafted)[:, None], cached[:, None]
        ar = autoregressive[:, None]

        fed = c + torch.arange(pending, device=device)  # [R, P]
        last = (committed[:, None] - c - 1).clamp(min=0)  # column of a row's last committed token
        offsets, positions, valid = fed, fed, fed < n
        if windows:
            slot_of_window = torch.arange(WINDOW, device=device)
            offsets = torch.cat([offsets, n + slot_of_window], 1)
            positions = torch.cat([positions, n - 1 + slot_of_window], 1)
            valid = torch.cat([valid, ~ar.expand(-1, WINDOW)], 1)

        # Pending token i sees keys 0 … i. A window slot sees 0 … n-2 and the window; never n-1, which slot 0 repeats.
        key = torch.arange(round_up(longest), device=device)
        visible = key <= fed[..., None]
        if windows:
            window = (key < n - 1) | ((key >= n) & (key < n + WINDOW))
            visible = torch.cat([visible, window[:, None].expand(-1, WINDOW, -1)], 1)
        # A cell nobody uses sees key 0, for a query that sees nothing would be NaN.
        self.visible = torch.where(valid[..., None], visible, key == 0)
        self._mask: torch.Tensor | None = None

        cells = torch.arange(rows * width, device=device)
        if packed:
            self.kept = cells[valid.flatten()]
            column = torch.arange(width, device=device)
            read = (column >= pending) | ((ar | verified[:, None]) & (column >= last))
            self.lines = (valid.flatten().long().cumsum(0) - 1)[(read & valid).flatten()]
        else:
            self.kept = self.lines = cells
            if not all_lines:
                read = torch.where(ar, last, pending + slot_of_window) if windows else last  # [R, 6 or 1]
                self.lines = (read + width * torch.arange(rows, device=device)[:, None]).flatten()
            # an unused cell writes to its slot's last place, which nobody attends to
            offsets = torch.where(valid, offsets, -1)
        self.slots = self.kept // width
        self.offsets = offsets.flatten()[self.kept]
        self.positions = positions.flatten()[self.kept].unsqueeze(0)
        # window slots 1 … 5 hold the mask token; slot 0 repeats the token at its position
        self.masked = self.kept % width > pending

    def to(self, device: torch.device, **kwargs) -> DecodeStep:
        """accelerate calls this before each layer, which may live on another device."""
        if device == self.slots.device:
            return self
        moved = copy(self)
        moved._mask = None
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
        """Additive `[R, 1, group * Q, K]`, 0 where visible: the same for each of a key head's `group` query heads.

        Made once a step: every layer asks for the same one.
        """
        if self._mask is None or self._mask.dtype != dtype:
            hidden = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
            hidden.masked_fill_(~self.visible, float("-inf"))
            self._mask = hidden.unsqueeze(1).repeat(1, group, 1, 1).flatten(1, 2).unsqueeze(1)
        return self._mask
