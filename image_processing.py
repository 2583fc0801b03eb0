# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Pictures to patches, bit for bit as the published processor (checkpoint.md, "Image preprocessing")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .media import load_image

# The vision tower has positions for fewer patches a side than this.
MAX_PATCHES_PER_SIDE = 512


class LocateAnythingImageProcessor(BaseImageProcessor):
    """Images to MoonViT's patches (checkpoint.md, "Image preprocessing"), bit for bit as the published processor.

    Args:
        patch_size: side of a square patch, in pixels.
        in_token_limit: most patches (before padding to whole merges) that an image keeps; larger ones are shrunk.
        merge_kernel_size: (rows, columns) of patches that become one image token.
        image_mean, image_std: per channel, of pixels in 0…1.

    Raises:
        ValueError: a number out of range.
    """

    model_input_names = ["pixel_values", "image_grid_hws"]

    def __init__(
        self,
        patch_size: int = 14,
        in_token_limit: int = 25600,
        merge_kernel_size: Sequence[int] = (2, 2),
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ):
        methods = sorted(name for name in kwargs if callable(getattr(type(self), name, None)))
        if methods:
            raise ValueError(
                f"{', '.join(methods)}: got a value for a method of the processor; expected settings only."
            )
        super().__init__(**kwargs)
        for name, value in (("patch_size", patch_size), ("in_token_limit", in_token_limit)):
            if not is_count(value):
                raise ValueError(f"{name}: got {value!r}; expected a whole number of 1 or more.")
        if not is_list(merge_kernel_size) or len(merge_kernel_size) != 2 or not all(map(is_count, merge_kernel_size)):
            raise ValueError(f"merge_kernel_size: got {merge_kernel_size!r}; expected (rows, columns) of patches.")
        for name, values, least in (("image_mean", image_mean, 0.0), ("image_std", image_std, 1e-6)):
            if not is_list(values) or len(values) != 3 or not all(_is_share(value, least) for value in values):
                raise ValueError(f"{name}: got {values!r}; expected three numbers of {least:g} to 1.")
        self.patch_size = patch_size
        self.in_token_limit = in_token_limit
        self.merge_kernel_size = list(merge_kernel_size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """Turns images into patches.

        Args:
            images: one image or a list of them, each anything `media.load_image` takes.
            return_tensors: "pt" (also the default) or "np".

        Returns:
            pixel_values: float32 `[patches of all images, 3, patch_size, patch_size]`, each image row-major.
            image_grid_hws: int64 `[images, 2]`, rows and columns in patches.

        Raises:
            ValueError: no images, one that cannot be read, has a zero side, or is 512 patches or more a side.
        """
        images, _ = image_layout(images)
        if not images:
            raise ValueError("images: got an empty list; expected at least one image.")
        loaded = [Source(f"images[{index}]", image).load(load_image) for index, image in enumerate(images)]
        for index, image in enumerate(loaded):
            self.grid_of(image.height, image.width, f"images[{index}]")
        patches, grids = zip(*map(self.patchify, loaded), strict=True)
        data = {"pixel_values": torch.cat(patches), "image_grid_hws": torch.tensor(grids, dtype=torch.long)}
        return as_batch(data, return_tensors)

    def grid_of(self, height: int, width: int, name: str = "image") -> tuple[int, int]:
        """Rows and columns of patches that an image of `height`×`width` pixels has after preprocessing.

        Raises:
            ValueError: a zero side, or 512 patches or more a side. The message begins with `name`.
        """
        if height < 1 or width < 1:
            raise ValueError(f"{name}: is {width}×{height} pixels; a side of zero has no content.")
        rows, columns = self._snap(*self._shrink(height, width))
        if max(rows, columns) >= MAX_PATCHES_PER_SIDE:
            raise ValueError(
                f"{name}: {width}×{height} pixels make {columns}×{rows} patches of {self.patch_size} pixels; a side "
                f"must have fewer than {MAX_PATCHES_PER_SIDE}."
            )
        return rows, columns

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Patches of an image of `height`×`width` pixels (transformers' helper; there are no `images_kwargs`)."""
        if images_kwargs:
            raise ValueError(f"images_kwargs: got {images_kwargs}; there are none that change the number of patches.")
        rows, columns = self.grid_of(height, width)
        return rows * columns

    def get_number_of_image_tokens(self, height: int, width: int) -> int:
        """Image tokens, one for each merge of patches, of an image of `height`×`width` pixels."""
        return self.tokens_of(self.grid_of(height, width))

    def tokens_of(self, grid: tuple[int, int]) -> int:
        """Image tokens of a grid of (rows, columns) patches."""
        return grid[0] * grid[1] // (self.merge_kernel_size[0] * self.merge_kernel_size[1])

    def patchify(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
        """Patches float32 `[rows * columns, 3, patch_size, patch_size]` of one RGB image, and (rows, columns)."""
        rows, columns = self.grid_of(image.height, image.width)
        side = self.patch_size
        height, width = self._shrink(image.height, image.width)
        # Two resizes where the image is over the limit, as published: the pixels depend on it.
        for size in ((width, height), (columns * side, rows * side)):
            if image.size != size:
                image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).view(rows, side, columns, side, 3)
        patches = pixels.permute(0, 2, 4, 1, 3).reshape(-1, 3, side, side).float()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return patches.div_(255).sub_(mean).div_(std), (rows, columns)

    def _shrink(self, height: int, width: int) -> tuple[int, int]:
        patches = (width // self.patch_size) * (height // self.patch_size)
        if patches <= self.in_token_limit:
            return height, width
        scale = (self.in_token_limit / patches) ** 0.5
        return max(1, int(height * scale)), max(1, int(width * scale))

    def _snap(self, height: int, width: int) -> tuple[int, int]:
        merge_rows, merge_columns = self.merge_kernel_size
        return (
            -(-height // (merge_rows * self.patch_size)) * merge_rows,
            -(-width // (merge_columns * self.patch_size)) * merge_columns,
        )


@dataclass(frozen=True)
class Source:
    """An image or a video as it came, and what an error message calls it."""

    name: str
    value: Any

    def load(self, load: Callable[[Any], Any]) -> Any:
        try:
            return load(self.value)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error


def is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def _is_share(value: Any, least: float) -> bool:
    return isinstance(value, (int, float)) and least <= value <= 1


def is_number(value: Any) -> bool:
    """A number that float32 can hold: no NaN, no infinity."""
    return isinstance(value, Real) and abs(value) < 1e9  # type: ignore[operator]


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def to_list(array: np.ndarray | torch.Tensor, name: str) -> Any:
    """An array's values in lists.

    Raises:
        ValueError: a sparse tensor, or one without values. The message begins with `name`.
    """
    try:
        return array.tolist()
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name}: got a tensor whose values cannot be read ({error}).") from None


def as_batch(data: dict[str, Any], return_tensors: str | None) -> BatchFeature:
    if return_tensors == "np":
        data = {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in data.items()}
    return BatchFeature(data, tensor_type=return_tensors)


def image_layout(images: Any) -> tuple[list[Any], bool]:
    """The images in a list, and whether it is a list of lists, one per text."""
    if images is None:
        return [], False
    if is_array(images) and images.ndim == 4:
        return list(images), False
    if not is_list(images):
        return [images], False
    return list(images), any(map(is_list, images))
