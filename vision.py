# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""MoonViT: patches of many images in one pass, packed; attention inside each image, never a dense mask.

Parameter names and shapes are the official checkpoint's (checkpoint.md, "Tensors" and "Vision tower").
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration import MoonViTConfig

ROPE_BASE = 10000.0


class PackedImages:
    """Where each image lies in a packed sequence of patches, and the rotations of its patches.

    Args:
        sizes: (rows, columns) in patches of each image, in packed order.
        rotations: `[patches, head_dim / 2]` complex64, of length 1.
    """

    def __init__(self, sizes: list[tuple[int, int]], rotations: torch.Tensor):
        self.lengths = [h * w for h, w in sizes]
        self.rotations = rotations

    def to(self, device: torch.device, **kwargs) -> PackedImages:
        """accelerate calls this when the next block lives on another device."""
        moved = PackedImages([], self.rotations.to(device, **kwargs))
        moved.lengths = self.lengths
        return moved


def rotate_pairs(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotary embedding on neighbouring pairs, in float32. x: `[L, …, D]`; rotations: `[L, D / 2]` complex64."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    rotations = rotations.view(len(rotations), *[1] * (x.dim() - 2), -1)
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def rotary_table(height: int, width: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Angles `[height * width, head_dim / 2]` float32 of an image: pairs alternate column, row, column, row, …"""
    frequency = ROPE_BASE ** (-torch.arange(0, head_dim, 4, device=device).float() / head_dim)
    columns = torch.arange(width, device=device).repeat(height)
    rows = torch.arange(height, device=device).repeat_interleave(width)
    return torch.stack((columns[:, None] * frequency, rows[:, None] * frequency), dim=-1).flatten(-2)


class PatchEmbed(nn.Module):
    def __init__(self, config: MoonViTConfig):
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(3, config.hidden_size, kernel_size=size, stride=size)
        self.pos_emb = PositionGrid(config)

    def forward(self, pixel_values: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor:
        return self.proj(pixel_values).flatten(1) + self.pos_emb(sizes)


class PositionGrid(nn.Module):
    """The learned grid, resampled to each image's size (bicubic, unless it has that size already)."""

    def __init__(self, config: MoonViTConfig):
        super().__init__()
        shape = (config.init_pos_emb_height, config.init_pos_emb_width, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, sizes: list[tuple[int, int]]) -> torch.Tensor:
        tables = {size: self.resampled(size) for size in set(sizes)}
        return torch.cat([tables[size] for size in sizes])

    def resampled(self, size: tuple[int, int]) -> torch.Tensor:
        if size == tuple(self.weight.shape[:2]):
            return self.weight.flatten(0, 1)
        grid = self.weight.permute(2, 0, 1).unsqueeze(0)
        return F.interpolate(grid, size=size, mode="bicubic").squeeze(0).permute(1, 2, 0).flatten(0, 1)


class MoonViTMLP(nn.Module):
    def __init__(self, config: MoonViTConfig):
        super().__init__()
        self.fc0 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc1 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc1(F.gelu(self.fc0(x), approximate="tanh"))


class MoonViTBlock(nn.Module):
    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: MoonViTConfig):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        self.num_key_value_groups = 1
        self.norm0 = nn.LayerNorm(config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlp = MoonViTMLP(config)

    def forward(self, hidden_states: torch.Tensor, images: PackedImages) -> torch.Tensor:
        """hidden_states: `[patches, hidden]`, packed."""
        hidden_states = hidden_states + self.wo(self.attend(self.wqkv(self.norm0(hidden_states)), images))
        return hidden_states + self.mlp(self.norm1(hidden_states))

    def attend(self, qkv: torch.Tensor, images: PackedImages) -> torch.Tensor:
        """qkv: `[patches, 3 * hidden]` → `[patches, hidden]`; full attention inside each image."""
        heads = qkv.unflatten(-1, (3, self.heads, self.head_dim))
        query, key = rotate_pairs(heads[:, :2], images.rotations).unbind(1)
        value = heads[:, 2]
        attention = vision_attention_function(self.config._attn_implementation)
        return attention(self, query, key, value, images.lengths).flatten(1)


def vision_attention_function(implementation: str | None) -> Callable[..., torch.Tensor]:
    if implementation is not None and "flash" in implementation:
        return _flash_attention
    return _eager_attention if implementation == "eager" else _sdpa_attention


def _by_equal_length(lengths: list[int]):
    """(first patch, images, patches an image) of each run of equally long neighbours."""
    start = 0
    for length, run in groupby(lengths):
        images = len(list(run))
        yield start, images, length
        start += images * length


def _sdpa_attention(block, query, key, value, lengths):
    """q, k, v: `[patches, heads, D]`. One 4-D call per run of equally long images: memory linear in patches."""
    output = torch.empty_like(query)
    for start, images, length in _by_equal_length(lengths):
        span = slice(start, start + images * length)
        q, k, v = (x[span].unflatten(0, (images, length)).transpose(1, 2) for x in (query, key, value))
        output[span] = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    return output


def _eager_attention(block, query, key, value, lengths):
    """The same by plain products, one image at a time: quadratic in an image's patches, for inspection."""
    output = torch.empty_like(query)
    for start, images, length in _by_equal_length(lengths):
        for first in range(start, start + images * length, length):
            span = slice(first, first + length)
            scores = torch.einsum("qhd,khd->hqk", query[span], key[span]) * block.head_dim**-0.5
            weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
            output[span] = torch.einsum("hqk,khd->qhd", weights, value[span])
    return output


def _flash_attention(block, query, key, value, lengths):
    """Every image in one varlen call of the flash kernel that transformers found."""
    ends = torch.tensor([0, *lengths], device=query.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    output, _ = ALL_ATTENTION_FUNCTIONS[block.config._attn_implementation](
        block,
        *(x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)),
        attention_mask=None,
        dropout=0.0,
        scaling=block.head_dim**-0.5,
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        is_causal=False,
    )
    return output.squeeze(0)


class MoonViTEncoder(nn.Module):
    def __init__(self, config: MoonViTConfig):
        super().__init__()
        self.blocks = nn.ModuleList([MoonViTBlock(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, images: PackedImages) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, images)
        return self.final_layernorm(hidden_states)


class MoonViTModel(PreTrainedModel):
    """The vision tower: pixels in, one feature per image token out."""

    config_class = MoonViTConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["MoonViTBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True

    def __init__(self, config: MoonViTConfig):
        super().__init__(config)
        self.patch_embed = PatchEmbed(config)
        self.encoder = MoonViTEncoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PositionGrid):
            nn.init.normal_(module.weight)

    def forward(self, pixel_values: torch.Tensor, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        """Encodes a pack of images.

        Args:
            pixel_values: `[patches, 3, P, P]`, the images' patches one after another, row-major.
            sizes: (rows, columns) in patches of each image; both even.

        Returns:
            Per image `[tokens, 4 * hidden]`: the features of each 2×2 group of patches, in (row, column) order.
        """
        # equally long images side by side share one attention call
        order = sorted(range(len(sizes)), key=lambda i: sizes[i])
        if order != list(range(len(sizes))):
            pieces = pixel_values.split([h * w for h, w in sizes])
            pixel_values = torch.cat([pieces[i] for i in order])
        ordered = [sizes[i] for i in order]

        hidden_states = self.patch_embed(pixel_values, ordered)
        hidden_states = self.encoder(hidden_states, self.pack(ordered, hidden_states.device))

        features: list[torch.Tensor] = [hidden_states] * len(sizes)
        for i, piece in zip(order, hidden_states.split([h * w for h, w in ordered]), strict=True):
            features[i] = self.merge(piece, *sizes[i])
        return features

    def pack(self, sizes: list[tuple[int, int]], device: torch.device) -> PackedImages:
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        tables = {size: rotary_table(*size, head_dim, device) for size in set(sizes)}
        angles = torch.cat([tables[size] for size in sizes])
        return PackedImages(sizes, torch.complex(angles.cos(), angles.sin()))

    def merge(self, features: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """`[height * width, C]` → `[tokens, rows * columns * C]`."""
        rows, columns = self.config.merge_kernel_size
        grid = features.view(height // rows, rows, width // columns, columns, -1).transpose(1, 2)
        return grid.reshape(height // rows * (width // columns), -1)
