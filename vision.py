# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""MoonViT: patches of many images in one pass, packed; attention inside each image, never a dense mask.

Parameter names and shapes are the official checkpoint's (docs/checkpoint.md, "Tensors" and "Vision tower").
"""

import functools
import math
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Sequences, attend, attend_packed, chosen_backends
from .configuration import MoonViTConfig

ROPE_BASE = 10000.0
PATCHES_A_PASS = 25600  # of the tower: one image of the largest size, or many small ones
PATCHES_A_CPU_PASS = 2048  # what more would hold in between is fresh pages each time: 8% slower at 8,192


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


class MoonViTBlock(GradientCheckpointingLayer):
    def __init__(self, config: MoonViTConfig):
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.heads
        self.norm0 = nn.LayerNorm(config.hidden_size)
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlp = MoonViTMLP(config)

    def forward(self, hidden_states: torch.Tensor, rotations: torch.Tensor, images: Sequences) -> torch.Tensor:
        """hidden_states: `[patches, hidden]`, packed; rotations: of each patch, `[patches, head_dim / 2]` complex64 of
        length 1; images: where each lies."""
        hidden_states = hidden_states + self.wo(self.attend(self.wqkv(self.norm0(hidden_states)), rotations, images))
        return hidden_states + self.mlp(self.norm1(hidden_states))

    def attend(self, qkv: torch.Tensor, rotations: torch.Tensor, images: Sequences) -> torch.Tensor:
        """qkv: `[patches, 3 * hidden]` → `[patches, hidden]`; full attention inside each image."""
        heads = qkv.unflatten(-1, (3, self.heads, self.head_dim))
        query, key = rotate_pairs(heads[:, :2], rotations).unbind(1)
        value = heads[:, 2]
        how: dict[str, Any] = {"scaling": self.head_dim**-0.5, "causal": False}
        attended = attend_packed(self, query, key, value, images, **how)
        if attended is None:
            # one 4-D call per run of equally long images: memory linear in patches
            attended, start = torch.empty_like(query), 0
            for length, run in groupby(images.lengths):
                shape = (len(list(run)), length)
                span = slice(start, start + math.prod(shape))
                q, k, v = (x[span].unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
                attended[span].unflatten(0, shape).copy_(attend(self, q, k, v, **how).transpose(1, 2))
                start = span.stop
        return attended.flatten(1)


class MoonViTEncoder(nn.Module):
    def __init__(self, config: MoonViTConfig):
        super().__init__()
        self.blocks = nn.ModuleList([MoonViTBlock(config) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, rotations: torch.Tensor, images: Sequences) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states, rotations, images)
        return self.final_layernorm(hidden_states)


class MoonViTModel(PreTrainedModel):
    """The vision tower: pixels in, one feature per image token out."""

    config_class = MoonViTConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoonViTBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True

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
            sizes: (rows, columns) in patches of each image; both even. Without a kernel for all at once, attention is
                one call for each run of equally many patches, so such images come side by side.

        Returns:
            Per image `[tokens, 4 * hidden]`: the features of each 2×2 group of patches, in (row, column) order.
        """
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        tables = {size: rotary_table(*size, head_dim, pixel_values.device) for size in set(sizes)}
        angles = torch.cat([tables[size] for size in sizes])
        rotations = torch.complex(angles.cos(), angles.sin())
        images = Sequences([height * width for height, width in sizes], pixel_values.device)
        with chosen_backends(pixel_values.device):
            encoded = self.encoder(self.patch_embed(pixel_values, sizes), rotations, images).split(images.lengths)
        return [self.merge(image, *size) for image, size in zip(encoded, sizes, strict=True)]

    def merge(self, features: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """`[height * width, C]` → `[tokens, rows * columns * C]`."""
        rows, columns = self.config.merge_kernel_size
        grid = features.view(height // rows, rows, width // columns, columns, -1).transpose(1, 2)
        return grid.reshape(height // rows * (width // columns), -1)


class ImageFeatures:
    """The image side of a model with a `vision_model`, a projector `mlp1` and a `config`: pixels to image tokens."""

    vision_model: Any
    mlp1: Any
    config: Any
    image_token_index: int

    def extract_feature(
        self, pixel_values: Any, image_grid_hws: Any, patches_a_pass: int = PATCHES_A_PASS
    ) -> list[torch.Tensor]:
        """The vision tower's features, which `generate(visual_features=…)` takes to reuse them across calls.

        Args:
            pixel_values: `[patches, 3, 14, 14]`, images one after another. image_grid_hws: `[images, 2]`, (rows,
                columns) in patches. patches_a_pass: at most (one image at least), which bounds memory.

        Returns:
            Per image `[tokens, 4 * vision hidden]`, before the projector.

        Raises:
            ValueError: no grids, or grids that do not make up the pixels.
        """
        images, sizes = read_images(pixel_values, image_grid_hws)
        place, dtype = place_of(self.vision_model), self.vision_model.dtype
        if place.type == "cpu":
            patches_a_pass = min(patches_a_pass, PATCHES_A_CPU_PASS)
        features: dict[int, torch.Tensor] = {}
        waiting = sorted(range(len(images)), key=lambda image: len(images[image]))
        while waiting:
            taken = accumulate(len(images[image]) for image in waiting)
            count = max(1, sum(patches <= patches_a_pass for patches in taken))
            chosen, waiting = waiting[:count], waiting[count:]
            pixels = torch.cat([images[image] for image in chosen]).to(place, dtype)
            encoded = self.vision_model(pixels, [sizes[image] for image in chosen])
            features.update(zip(chosen, encoded, strict=True))
        return [features[image] for image in range(len(images))]

    def project(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Projects vision-tower features, `[tokens, 4 * vision hidden]` each, to `[tokens, hidden]`."""
        if not len(features):
            return []
        place, dtype = place_of(self.mlp1), self.mlp1[0].weight.dtype
        joined = torch.cat([feature.to(place, dtype) for feature in features])
        return list(self.mlp1(joined).split([len(feature) for feature in features]))

    def get_image_features(self, pixel_values: Any, image_grid_hws: Any) -> list[torch.Tensor]:
        """Per image `[tokens, hidden]`, ready for the decoder's image slots."""
        return self.project(self.extract_feature(pixel_values, image_grid_hws))

    # ---- transformers' own generate

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # its signature says what generate may be given
    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        fed = inputs.get("input_ids")
        if fed is not None and not (fed == self.image_token_index).any():
            # the images are in the cache already
            for name in ("pixel_values", "image_grid_hws", "visual_features"):
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, **kwargs):
        if expand_size > 1:  # transformers would repeat each patch, not each picture
            raise ValueError(f"{expand_size} answers or beams a row: only one is given; repeat the row.")
        return super()._expand_inputs_for_generation(**kwargs)  # type: ignore[misc]


def of_flagged(features: list[torch.Tensor], image_flags: Any) -> list[torch.Tensor]:
    """Features of images, without those of images that stand for none: `image_flags` as of the model's forward."""
    flags = torch.as_tensor(image_flags).flatten().tolist()
    counts = [bool(flag) for flag in flags for _ in range(flag or 1)]
    if len(counts) != len(features):
        raise ValueError(f"image_flags {flags} tell of {len(counts)} images; there are {len(features)}.")
    # what is passed over stays in the graph, empty: every process then has the same gradients to share
    return [image if counted else image[:0] for image, counted in zip(features, counts, strict=True)]


def read_images(pixel_values: Any, image_grid_hws: Any) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:
    """Patches `[rows * columns, 3, P, P]` and (rows, columns) of each image, from what the processor gives.

    Raises:
        ValueError: pixels without grids, or grids that do not make them up.
    """
    if pixel_values is None or len(pixel_values) == 0:
        return [], []
    if image_grid_hws is None:
        raise ValueError("pixel_values came without image_grid_hws; pass the processor's output whole.")
    sizes = [(int(height), int(width)) for height, width in torch.as_tensor(image_grid_hws).tolist()]
    patches = [height * width for height, width in sizes]
    if isinstance(pixel_values, (list, tuple)):
        if [len(image) for image in pixel_values] == patches:  # one each, as `generate` keeps them: nothing to copy
            return [torch.as_tensor(image) for image in pixel_values], sizes
        pixel_values = torch.cat([torch.as_tensor(image) for image in pixel_values])
    pixels = torch.as_tensor(pixel_values)
    if pixels.dim() != 4 or len(pixels) != sum(patches):
        found = list(pixels.shape)
        raise ValueError(f"pixel_values are {found}, but image_grid_hws {sizes} make [{sum(patches)}, 3, P, P].")
    return list(pixels.split(patches)), sizes


def place_of(module: nn.Module) -> torch.device:
    """Where a module runs; if accelerate has offloaded its weights, the hooks on its parts say it."""
    place = next(module.parameters()).device
    if place.type == "meta":
        hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks)
        place = torch.device(next(place for place in places if place is not None))
    return place
