# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""A batch's prompts and images as `generate` receives them: checked, taken apart by row, encoded on demand."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch

from .configuration import LocateAnythingConfig, MoonViTConfig

PATCHES_A_PASS = 25600  # of the vision tower: one image of the largest size, or many small ones


@dataclass(frozen=True)
class Prompts:
    """rows: each row's tokens without padding. slots: image slots of each row. input_ids: `[rows, L]` as they came."""

    input_ids: torch.Tensor
    rows: list[list[int]]
    slots: list[int]


def read_prompts(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    config: LocateAnythingConfig,
    device: torch.device,
) -> Prompts:
    """Takes a left-padded batch apart.

    Args:
        input_ids: `[rows, L]` long. attention_mask: `[rows, L]`, or None: then the pad tokens at a row's ends are
            padding.

    Raises:
        ValueError: no rows, wrong shapes, padding anywhere but on the left, an id outside the vocabulary, a prompt
            that ends in an image slot.
    """
    if input_ids is None:
        raise ValueError("generate() needs input_ids; got none.")
    input_ids = _tensor_of(input_ids, "input_ids")
    if not _whole(input_ids) or input_ids.dim() != 2:
        raise ValueError(f"input_ids are {input_ids.dtype} {list(input_ids.shape)}; expected integers [rows, length].")
    input_ids = input_ids.to(device, torch.long)
    if 0 in input_ids.shape:
        raise ValueError(f"input_ids are {list(input_ids.shape)}: an empty batch has no answer.")
    vocabulary = config.text_config.vocab_size
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(f"input_ids hold ids from {low} to {high}; the vocabulary has {vocabulary}.")

    if attention_mask is None:
        kept = (input_ids != config.pad_token_id).long()
        mask = (kept.cummax(1).values & kept.flip(1).cummax(1).values.flip(1)).bool()
    else:
        mask = _tensor_of(attention_mask, "attention_mask").to(device) != 0
        if mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask is {list(mask.shape)}; expected input_ids' {list(input_ids.shape)}.")
    _require_left_padding(mask, "input_ids pad" if attention_mask is None else "attention_mask pads")
    rows = [ids[kept].tolist() for ids, kept in zip(input_ids, mask, strict=True)]
    for index, row in enumerate(rows):
        if row[-1] == config.image_token_index:
            raise ValueError(f"row {index}: the prompt ends in an image slot; a question must follow its image.")
    return Prompts(input_ids, rows, [row.count(config.image_token_index) for row in rows])


def left_padded(inputs: Any) -> Any:
    """Turns a batch round that was padded on the right, as the stock's processor pads unless told.

    Args:
        inputs: a mapping (the processor's `BatchFeature`, a dict) with `input_ids` and `attention_mask`, `[rows, L]`
            each. Masked places go to the left of their row, in their order, whether they lie on the right, on the left
            or inside; tokens keep theirs.

    Returns:
        The same kind of mapping with these two padded on the left; every other entry is the same object.

    Raises:
        ValueError: no mapping, one of the two is missing, or they do not fit together.
    """
    if not isinstance(inputs, Mapping):
        raise ValueError(f"left_padded() got a {type(inputs).__name__}; expected the processor's output whole.")
    missing = [name for name in ("input_ids", "attention_mask") if inputs.get(name) is None]
    if missing:
        named = ", ".join(inputs) or "no entries"
        raise ValueError(f"left_padded() got no {' and no '.join(missing)}; its inputs have {named}.")
    try:
        input_ids, attention_mask = (_tensor_of(inputs[name], name) for name in ("input_ids", "attention_mask"))
    except ValueError as error:
        raise ValueError(f"left_padded() got {error} Rows are made one tensor with padding=True.") from None
    if not _whole(input_ids):
        raise ValueError(f"left_padded() got input_ids of {input_ids.dtype}; expected integers.")
    if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"left_padded() got input_ids {list(input_ids.shape)} and attention_mask {list(attention_mask.shape)}; "
            "expected [rows, length] of both."
        )
    order = (attention_mask != 0).long().argsort(dim=1, stable=True)
    turned: Any = copy.copy(inputs)
    for name, values in (("input_ids", input_ids), ("attention_mask", attention_mask)):
        # torch gathers no uint16 and the like
        turned[name] = values.long().gather(1, order.to(values.device)).to(values.dtype)
    return turned


def _require_left_padding(mask: torch.Tensor, what: str) -> None:
    """mask: `[rows, L]` bool. what: who says so."""
    for index, row in enumerate(mask.tolist()):
        if True not in row:
            raise ValueError(f"row {index}: attention_mask is 0 everywhere; an empty prompt has no answer.")
        first = row.index(True)
        if all(row[first:]):
            continue
        where = "right" if not any(row[row.index(False, first) :]) else "inside"
        raise ValueError(
            f"row {index}: {what} on the {where}; generate() needs padding on the left. model.left_padded(inputs), or "
            "patch.left_padded(inputs) for a patched model, turns such a batch round; or make it with "
            'padding_side="left" (LocateAnythingProcessor does; set tokenizer.padding_side = "left" elsewhere).'
        )


def read_grids(
    image_grid_hws: torch.Tensor | np.ndarray | Sequence[Sequence[int]] | None,
    config: MoonViTConfig,
    patches: int | None = None,
) -> list[tuple[int, int]]:
    """(rows, columns) in patches of each image.

    Args:
        patches: how many patches the pixels hold; checked against the grids' sum.

    Raises:
        ValueError: not `[images, 2]`, a side that is no positive multiple of the merge, or sums that differ.
    """
    if image_grid_hws is None:
        raise ValueError("pixel_values came without image_grid_hws; pass the processor's output whole.")
    grids = _tensor_of(image_grid_hws, "image_grid_hws")
    if grids.dim() != 2 or grids.shape[1] != 2 or not _whole(grids):
        raise ValueError(f"image_grid_hws is {grids.dtype} {list(grids.shape)}; expected integers [images, 2].")
    sizes = [(int(height), int(width)) for height, width in grids.tolist()]
    rows, columns = config.merge_kernel_size
    for index, (height, width) in enumerate(sizes):
        if height < 1 or width < 1 or height % rows or width % columns or max(height, width) >= 512:
            raise ValueError(
                f"image {index}: a grid of {height}×{width} patches; expected multiples of {rows}×{columns} below 512."
            )
    total = sum(height * width for height, width in sizes)
    if patches is not None and total != patches:
        raise ValueError(f"pixel_values hold {patches} patches, but image_grid_hws {sizes} make {total}.")
    return sizes


class PromptFeatures:
    """The image features of each row, checked at once and encoded when the loop takes them.

    Args:
        model: encodes and projects. pixel_values, image_grid_hws, visual_features: as `generate` takes them.

    Raises:
        ValueError: images that do not fill the rows' image slots exactly, in order.
    """

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        pixel_values: torch.Tensor | np.ndarray | Sequence[torch.Tensor] | None,
        image_grid_hws: torch.Tensor | np.ndarray | None,
        visual_features: Sequence[torch.Tensor] | torch.Tensor | np.ndarray | None,
    ):
        self.model = model
        self.repeats = 1
        self.patches_a_pass = PATCHES_A_PASS
        self.given: list[torch.Tensor] | None = None
        self.projected = False
        self.pixels: list[torch.Tensor] = []
        self.sizes: list[tuple[int, int]] = []
        vision = model.config.vision_config
        if isinstance(visual_features, (torch.Tensor, np.ndarray)):
            visual_features = _tensor_of(visual_features, "visual_features")
            hidden = model.config.text_config.hidden_size
            _require_width([visual_features], hidden, "visual_features (one tensor: projected)")
            # of projected features, what fills slots side by side counts as one image
            if sum(prompts.slots) != len(visual_features):
                _refuse_count(sum(prompts.slots), len(visual_features), "visual_features")
            slot = model.config.image_token_index
            runs = [len(list(run)) for row in prompts.rows for shown, run in groupby(row, slot.__eq__) if shown]
            self.given, self.projected = list(visual_features.split(runs)), True
            self.tokens = [len(feature) for feature in self.given]
        elif visual_features is not None:
            self.given = _tensors_of(visual_features, "visual_features")
            merged = vision.hidden_size * vision.merge_kernel_size[0] * vision.merge_kernel_size[1]
            _require_width(self.given, merged, "visual_features (a list: the vision tower's, one per image)")
            self.tokens = [len(feature) for feature in self.given]
        elif pixel_values is not None:
            if isinstance(pixel_values, (list, tuple)):
                pieces = [read_patches(piece, vision.patch_size) for piece in pixel_values]
                pixel_values = torch.cat(pieces) if pieces else torch.empty(0, 3, vision.patch_size, vision.patch_size)
            pixel_values = read_patches(pixel_values, vision.patch_size)
            self.sizes = read_grids(image_grid_hws, vision, len(pixel_values))
            self.pixels = list(pixel_values.split([height * width for height, width in self.sizes]))
            rows, columns = vision.merge_kernel_size
            self.tokens = [height * width // (rows * columns) for height, width in self.sizes]
        else:
            self.tokens = []
        of_rows = images_by_row(prompts.slots, self.tokens)
        same = first_equal(self.pixels, self.sizes) if self.given is None else first_equal(self.given)
        self.images = [[same[image] for image in images] for images in of_rows]
        self.waiting: Counter[int] = Counter()  # rows that have yet to enter, by image
        self.encoded: dict[int, torch.Tensor] = {}

    def repeated(self, times: int) -> PromptFeatures:
        """For `num_return_sequences`: row i of the loop shows what row i // times of the prompts does."""
        self.repeats = times
        self.waiting = Counter({i: n * times for i, n in Counter(chain(*map(set, self.images))).items()})
        return self

    def layout(self, row: int) -> tuple[list[int], list[int]]:
        """Identity and tokens of each of a row's images; equal images have one identity."""
        images = self.images[row // self.repeats]
        return images, [self.tokens[image] for image in images]

    def take(self, wanted: list[tuple[int, int]]) -> list[torch.Tensor]:
        """Features `[tokens, hidden]` of each (row of the loop, tokens to skip)'s images, in order."""
        images = [image for row, skip in wanted for image in self._behind(row, skip)]
        missing = sorted(set(images) - self.encoded.keys())
        self.encoded.update(zip(missing, self.encode(missing), strict=True))
        return [self.encoded[image] for image in images]

    def release(self, row: int) -> None:
        """A row has entered: features that no waiting row shows are dropped."""
        for image in set(self.images[row // self.repeats]):
            self.waiting[image] -= 1
            if self.waiting[image] <= 0:
                self.encoded.pop(image, None)

    def halve(self) -> None:
        self.patches_a_pass = max(1, self.patches_a_pass // 2)

    def _behind(self, row: int, skip: int) -> list[int]:
        """A row's images behind its first `skip` image tokens."""
        images = []
        for image in self.images[row // self.repeats]:
            if skip <= 0:
                images.append(image)
            skip -= self.tokens[image]
        return images

    def encode(self, images: list[int]) -> list[torch.Tensor]:
        """`[tokens, hidden]` of each image."""
        if not images:
            return []
        if self.given is None:
            pixels = torch.cat([self.pixels[image] for image in images])
            grids = torch.tensor([self.sizes[image] for image in images])
            return self.model.project(self.model.extract_feature(pixels, grids, self.patches_a_pass))
        features = [self.given[image] for image in images]
        place = next(self.model.mlp1.parameters())
        return features if self.projected else self.model.project([f.to(place.device, place.dtype) for f in features])


def first_equal(images: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]] | None = None) -> list[int]:
    """For each tensor, the place of the first one equal to it. Two are compared only if their fingerprints agree.

    Args:
        sizes: of the images whose patches these are: the same patches may lie in a wide grid or in a high one.
    """
    seen: dict[tuple, list[int]] = {}
    first = []
    for place, image in enumerate(images):
        probe = image.flatten()[:: max(1, image.numel() // 4096)].double()
        size = sizes[place] if sizes else None
        alike = seen.setdefault((tuple(image.shape), size, float(probe.sum()), float(probe.square().sum())), [])
        equal = next((other for other in alike if images[other] is image or torch.equal(images[other], image)), place)
        if equal == place:
            alike.append(place)
        first.append(equal)
    return first


def images_by_row(slots: list[int], tokens: list[int]) -> list[list[int]]:
    """Which images fill each row's slots, in order.

    Args:
        slots: image slots of each row. tokens: image tokens of each image.

    Raises:
        ValueError: a row's slots end inside an image, images run out, or images are left over.
    """
    rows: list[list[int]] = []
    image = 0
    for index, count in enumerate(slots):
        own: list[int] = []
        while count > 0 and image < len(tokens):
            own.append(image)
            count -= tokens[image]
            image += 1
        if count:
            filled = sum(tokens[i] for i in own)
            raise ValueError(
                f"row {index} has {slots[index]} image slots, but its images give {filled} tokens; the prompt and the "
                "images do not belong together."
            )
        rows.append(own)
    if image < len(tokens):
        _refuse_count(sum(slots), sum(tokens), f"{len(tokens)} images")
    return rows


def _tensor_of(value: Any, name: str) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError) as error:  # ragged, words, numbers beyond int64
        raise ValueError(f"{name}: got a {type(value).__name__} that is no tensor ({error}).") from None
    if tensor.is_meta:
        raise ValueError(f"{name}: got a tensor on the meta device, which holds no values.")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantised" if tensor.is_quantized else str(tensor.layout)
        raise ValueError(f"{name}: got a {kind} tensor; expected a dense one.")
    return tensor


def _whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _tensors_of(values: Any, name: str) -> list[torch.Tensor]:
    """Tensors, or arrays, one for each image."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name}: got a {type(values).__name__}; expected a tensor, or a list of them.")
    return [_tensor_of(value, f"{name}[{index}]") for index, value in enumerate(values)]


def read_patches(pixels: Any, side: int) -> torch.Tensor:
    """Pixels `[patches, 3, side, side]`, floating point.

    Raises:
        ValueError: anything else.
    """
    pixels = _tensor_of(pixels, "pixel_values")
    if pixels.dim() != 4 or pixels.shape[1:] != (3, side, side) or not pixels.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixels.dtype} {list(pixels.shape)}; "
            f"expected [patches, 3, {side}, {side}], floating point."
        )
    return pixels


def _require_width(features: list[torch.Tensor], width: int, what: str) -> None:
    for feature in features:
        if feature.dim() != 2 or feature.shape[1] != width or not feature.is_floating_point():
            raise ValueError(
                f"{what} are {feature.dtype} {list(feature.shape)}; expected [tokens, {width}], floating point."
            )


def _refuse_count(slots: int, tokens: int, of: str) -> None:
    raise ValueError(f"input_ids have {slots} image slots, but {of} give {tokens} tokens.")
