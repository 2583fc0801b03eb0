# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Pictures in any form → RGB → patches (docs/checkpoint.md, "Image preprocessing")."""

import base64
import io
import os
import re
import string
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from math import ceil, inf, prod
from typing import Any, TypedDict
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, ImageSequence
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

MAX_PATCHES_PER_SIDE = 512  # the vision tower has positions for fewer
TOKEN_SIDE = 28  # pixels a side of what becomes an image token
URL_TIMEOUT = 30.0  # seconds without a byte
MAX_DOWNLOAD = 256 * 2**20  # bytes
BYTES, ARRAYS = (bytes, bytearray, memoryview), (np.ndarray, torch.Tensor)
# The keys of an image item. The first of these counts: what `datasets` hands out has bytes and a path to nowhere.
SOURCE_KEYS = ("image", "image_url", "bytes", "base64", "path", "url")
SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# What messages for OpenAI, Anthropic, LiteLLM and vLLM and data sets have beside an image; it changes no pixel.
HARMLESS_KEYS = ("type", "text", "detail", "format", "mime_type", "media_type", "id", "uuid", "name", "cache_control")


def load_image(source: Any, *, upright: bool = False, copy: bool = True) -> Image.Image:
    """Reads one picture (docs/checkpoint.md, "Image preprocessing").

    RGBA is composited on white, 16-bit greys keep their upper 8 bits (as PIL does with 16-bit colours), every other
    mode is what `Image.convert("RGB")` makes of it. Of several frames or pages the first is taken, with a warning.

    Args:
        source: one of
            a PIL image; a path; a `file://`, `http(s)://` or `data:` URL; the bytes of an image file; a binary file;
            a numpy array or torch tensor `[H, W]`, `[H, W, C]` or `[C, H, W]` with C of 1, 3 or 4 (RGBA), uint8,
            uint16 or floating point in 0…1; where both layouts are possible an array is HWC and a tensor CHW;
            a dict with one of these under one of `SOURCE_KEYS`. Beside it, `min_pixels` and `max_pixels` are a budget
            to which the picture is resized, `resized_height` and `resized_width` a size; both in pixels, made of
            multiples of 28. `HARMLESS_KEYS`, and keys with None, say nothing.
        upright: turn the picture as its EXIF orientation says. The published processor does not.
        copy: False where it is only read: an RGB image may come back as it is.

    Returns:
        A new RGB image in memory, sized as the source is if nothing else was asked for.

    Raises:
        ValueError: the source has no pixels, cannot be read, is over PIL's decompression-bomb limit or 256 MiB to
            download, is PostScript, is of a mode without a range of its own (I, F), or is none of the above. The
            message names it, a URL without credentials and query.
    """
    if isinstance(source, Mapping):
        value, sizes = _read_item(source)
        return _resized(load_image(value, upright=upright, copy=copy), sizes)
    several = False
    with _opened(source) as image:
        loaded = _to_rgb(image, upright, is_ours=not copy or image is not source)
        with suppress(Exception):  # not from a file, or from one that is closed
            # a camera's MPO has previews and a PSD has layers, which are no frames
            several = image.is_animated and image.tell() == 0 and image.format not in ("MPO", "PSD")  # type: ignore
    if several:
        warnings.warn(f"image {shorten(source)}: has several frames or pages; the first is taken.", stacklevel=2)
    return loaded


def load_video(source: Any, *, upright: bool = False, copy: bool = True) -> list[Image.Image]:
    """Reads a video given as frames.

    Args:
        source: a list or tuple of anything `load_image` takes; a file of several frames or pages (GIF, APNG, WebP,
            TIFF) in any form that it takes; or an array or tensor `[frames, H, W, C]` or `[frames, C, H, W]`, uint8,
            uint16 or floating point in 0…1, or in 0…255 with fractions dropped, as torchvision reads it.
        upright, copy: as for `load_image`.

    Returns:
        The frames as RGB images, at least one.

    Raises:
        ValueError: no frames, a frame that `load_image` refuses, or a video file: no decoder is shipped.
    """
    if isinstance(source, Mapping):
        value, sizes = _read_item(source)
        return [_resized(frame, sizes) for frame in load_video(value, upright=upright, copy=copy)]
    if isinstance(source, ARRAYS):
        return [load_image(frame) for frame in _to_uint8(source, "video", dimensions=(4,), highest=255)]
    if is_list(source):
        return _load_each(source, "video", upright, copy)
    try:
        with _opened(source) as image:
            return ImageSequence.all_frames(image, lambda frame: _to_rgb(frame, upright))
    except ValueError as error:
        raise ValueError(f"video: {error} There is no video decoder; pass a list of frames.") from error


def shorten(source: Any, width: int = 100) -> str:
    """A source as a message names it: a path or URL quoted, cut where it is long, without credentials and query."""
    if isinstance(source, BYTES):
        return f"{len(source)} bytes"
    if not isinstance(source, (str, os.PathLike)):
        return f"({type(source).__name__})"
    text = re.sub(r"(?is)^\s*([a-z][a-z0-9+.-]*://)(?:[^/]*@)?([^?#]*).*", r"\1\2", str(source))
    return repr(text if len(text) <= width else f"{text[: width - 1]}…")


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """The source as a PIL image; what goes wrong with it, here or in the block, is a ValueError that names it."""
    try:
        if isinstance(source, Image.Image):
            yield source
        elif isinstance(source, ARRAYS):
            pixels = _to_uint8(source, "array", dimensions=(2, 3))
            yield Image.fromarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)
        else:
            with Image.open(_file_of(source)) as image:
                yield image
    except Image.UnidentifiedImageError:
        raise ValueError(f"image {shorten(source)}: not an image file that PIL can read.") from None
    except Exception as error:  # PIL's plugins raise whatever a broken file leads to, some of it in decoding
        raise ValueError(f"image {shorten(source)}: cannot be read ({error}).") from error


def _file_of(source: Any) -> Any:
    """A path or binary file for `Image.open`."""
    if isinstance(source, BYTES):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"got {type(source).__name__}; expected an image, array, path, URL, bytes, file or dict")
    text = os.fsdecode(source)
    scheme, _, rest = text.strip().partition(":")
    scheme = scheme.lower()
    if scheme in ("http", "https"):
        return io.BytesIO(_download(text.strip()))
    if scheme == "data":
        return io.BytesIO(urlopen(text).read())
    if scheme == "file":  # written plainly behind the scheme, or percent-encoded
        text = rest.removeprefix("//")
        text = text if os.path.exists(text) else unquote(text)
    if not os.path.isfile(text):  # reading from a pipe or a device may never end
        raise OSError("is no regular file" if os.path.exists(text) else "there is no such file")
    return text


def _download(url: str) -> bytes:
    """What a URL leads to. Messages and causes of the libraries are dropped: they quote passwords and redirections."""
    try:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        quoted = quote(parts._replace(netloc=host.encode("idna").decode()).geturl(), safe=string.punctuation)
        request = Request(quoted, headers={"User-Agent": "LocateAnything-batched"})
        if user:  # not sent on to where a redirection leads
            login = base64.b64encode(unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {login}")
        with urlopen(request, timeout=URL_TIMEOUT) as response:
            body = response.read(MAX_DOWNLOAD + 1)
    except HTTPError as error:
        raise OSError(f"the server answered {error.code}") from None
    except Exception as error:
        reason = getattr(error, "reason", None)
        raise OSError(f"no download: {reason if isinstance(reason, OSError) else type(error).__name__}") from None
    if len(body) > MAX_DOWNLOAD:
        raise OSError(f"larger than {MAX_DOWNLOAD} bytes")
    return body


def _to_uint8(source: Any, name: str, dimensions: Sequence[int], highest: int = 1) -> np.ndarray:
    """uint8 `[…, H, W, C]` or `[H, W]` of an array or tensor; floating point is in 0…1, or in 0…`highest`."""
    pixels, shape = source, tuple(source.shape)
    first, last = len(shape) > 2 and shape[-3] in (1, 3, 4), len(shape) == 2 or shape[-1:] in ((1,), (3,), (4,))
    if len(shape) not in dimensions or 0 in shape or not (first or last):
        raise ValueError(f"{name}: has the shape {list(shape)}; expected [H, W, C] or [C, H, W] of 1, 3 or 4 channels")
    is_tensor = isinstance(source, torch.Tensor)
    if is_tensor:
        pixels = source.detach().cpu()
        pixels = (pixels.float() if pixels.is_floating_point() else pixels).numpy()  # numpy has no bfloat16
    if first and (is_tensor or not last):
        pixels = np.moveaxis(pixels, -3, -1)
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2:
        pixels = pixels >> 8
    elif pixels.dtype.kind == "f":
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= highest):  # NaN fails too
            raise ValueError(f"{name}: has values from {low:g} to {high:g}; floating point is expected in 0…1")
        pixels = pixels if high > 1 else np.rint(pixels * 255)
    elif pixels.dtype != np.uint8:
        raise ValueError(f"{name}: is of {pixels.dtype}; expected uint8, uint16 or floating point")
    return np.ascontiguousarray(pixels, dtype=np.uint8)


def _read_item(item: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The source in an image item, and the sizes that it asks for."""
    given = {key: value for key, value in item.items() if value is not None}  # data sets fill items up with None
    unknown = given.keys() - {*SOURCE_KEYS, *SIZE_KEYS, *HARMLESS_KEYS}
    key = next((key for key in SOURCE_KEYS if key in given), None)
    if unknown or key is None:
        raise ValueError(
            f"image: got an item with the keys {sorted(map(str, unknown or given))}; expected one of {SOURCE_KEYS}, "
            f"and beside it only {SIZE_KEYS} or {HARMLESS_KEYS}."
        )
    value = given[key]
    if key == "base64" and isinstance(value, str) and value[:5].lower() != "data:":
        value = f"data:;base64,{value}"
    return value, {key: given[key] for key in SIZE_KEYS if key in given}


def _load_each(sources: Sequence[Any], name: str, upright: bool, copy: bool = False) -> list[Image.Image]:
    if not len(sources):
        raise ValueError(f"{name}: got an empty list; expected at least one.")
    images = []
    for index, source in enumerate(sources):
        try:
            images.append(load_image(source, upright=upright, copy=copy))
        except ValueError as error:
            raise ValueError(f"{name}[{index}]: {error}") from error
    return images


def _to_rgb(image: Image.Image, upright: bool, is_ours: bool = False) -> Image.Image:
    """The image in RGB. `is_ours`: it need not be copied, which takes as long as decoding."""
    if 0 in image.size:
        raise ValueError(f"{image.width}×{image.height} pixels; a side of zero has no content")
    if image.format == "EPS":  # PIL would start Ghostscript on it
        raise ValueError("PostScript is a program; expected a picture of pixels")
    # 16-bit PGM, and PNG before Pillow 11, are opened as I
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not is_16_bit:
        raise ValueError(f"its mode {image.mode} has no range of its own; scale it to uint8, uint16 or 0…1 first")
    if upright:
        image.load()
        with suppress(Exception):  # a broken EXIF block turns nothing
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would be copied
                image = ImageOps.exif_transpose(image)
    if is_16_bit:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if is_ours and image.mode == "RGB" and not getattr(image, "is_animated", False):
        image.load()
        if not image.readonly:  # else it lies in a file that PIL has mapped, or in an array
            return image
    if image.mode != "RGBA":
        return image.convert("RGB")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _resized(image: Image.Image, sizes: Mapping[str, Any]) -> Image.Image:
    """The image as large as an item's `SIZE_KEYS` say; it stays as it is within the budget."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}; expected a whole number of pixels.")
    wanted = [sizes.get(name, 0) for name in ("resized_height", "resized_width")]
    if any(wanted) and not all(wanted):
        raise ValueError(f"resized_height, resized_width: got {wanted}; expected both or none.")
    height, width = image.height / TOKEN_SIDE, image.width / TOKEN_SIDE
    least, most = sizes.get("min_pixels", 0) / TOKEN_SIDE**2, sizes.get("max_pixels", inf) / TOKEN_SIDE**2
    tokens = ceil(height) * ceil(width)  # that preprocessing would make
    scale = ((most if tokens > most else least) / (height * width)) ** 0.5
    if any(wanted):
        rows, columns = (max(1, round(side / TOKEN_SIDE)) for side in wanted)
    elif tokens > most:
        rows = max(1, min(int(height * scale), int(most)))
        columns = max(1, min(int(width * scale), int(most / rows)))
    elif tokens < least:
        rows, columns = ceil(height * scale), ceil(width * scale)
    else:
        return image
    return image.resize((columns * TOKEN_SIDE, rows * TOKEN_SIDE), Image.Resampling.BICUBIC)


class LocateAnythingImageProcessor(BaseImageProcessor):
    """Images to MoonViT's patches (docs/checkpoint.md, "Image preprocessing"), bit for bit as the published processor.

    Args:
        patch_size: side of a square patch, in pixels.
        in_token_limit: most patches (before padding to whole merges) that an image keeps; larger ones are shrunk.
        merge_kernel_size: (rows, columns) of patches that become one image token.
        image_mean, image_std: per channel, of pixels in 0…1.
        upright: turn pictures as their EXIF orientation says.
    """

    model_input_names = ["pixel_values", "image_grid_hws"]

    class valid_kwargs(TypedDict, total=False):
        """What transformers 5 takes from `from_pretrained(…)` without a warning."""

        in_token_limit: int
        upright: bool

    def __init__(
        self,
        patch_size: int = 14,
        in_token_limit: int = 25600,
        merge_kernel_size: Sequence[int] = (2, 2),
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        upright: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.in_token_limit = in_token_limit
        self.merge_kernel_size = list(merge_kernel_size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.upright = upright

    def to_dict(self) -> dict[str, Any]:
        """The settings but `image_processor_type`, by which 4.57 would look for a fast class and torchvision first."""
        return {name: value for name, value in super().to_dict().items() if name != "image_processor_type"}

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """Turns images into patches.

        Args:
            images: one image or a list of them, each anything `load_image` takes.
            return_tensors: "pt" (also the default) or "np".

        Returns:
            pixel_values: float32 `[patches of all images, 3, patch_size, patch_size]`, each image row-major.
            image_grid_hws: int64 `[images, 2]`, rows and columns in patches.

        Raises:
            ValueError: no images, one that cannot be read, has a zero side, or is 512 patches or more a side.
        """
        is_several = is_list(images) or (isinstance(images, ARRAYS) and images.ndim == 4)
        loaded = _load_each(images if is_several else [images], "images", self.upright)
        return BatchFeature(self.encode(loaded), tensor_type=return_tensors)

    def encode(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """What `preprocess` returns, of RGB images. Equal ones, as in rows about one picture, are computed once."""
        grids = [self.grid_of(image.height, image.width, f"images[{i}]") for i, image in enumerate(images)]
        ends = np.cumsum([rows * columns for rows, columns in grids])
        # Written in place, and by numpy, whose large arrays lie on huge pages: new memory costs more than arithmetic
        side, high = self.patch_size, self.patch_size * self.merge_kernel_size[0]
        pixel_values = np.empty((ends[-1], 3, side, side), np.float32)
        objects = {id(image): image for image in images}
        sizes = [image.size for image in objects.values()]
        shown = {i: sha256(x.tobytes()).digest() if sizes.count(x.size) > 1 else b"" for i, x in objects.items()}
        done: dict[Any, np.ndarray] = {}
        mean, std = (np.array(each, np.float32).reshape(3, 1, 1) for each in (self.image_mean, self.image_std))
        for image, (rows, columns), patches in zip(images, grids, np.split(pixel_values, ends[:-1]), strict=True):
            key = (image.size, shown[id(image)])
            if key in done:
                patches[:] = done[key]
                continue
            # Two resizes where the image is over the limit, as published: the pixels depend on it
            for height, width in (self._shrink(image.height, image.width), (rows * side, columns * side)):
                if image.size != (width, height):
                    image = image.resize((width, height), Image.Resampling.BICUBIC)
            for top, part in enumerate(np.split(patches, rows * side // high)):  # small enough for the CPU's cache
                # A line's reds, greens and blues one after the other: what a patch has of them is moved whole
                strip = image.crop((0, top * high, columns * side, (top + 1) * high)).tobytes("raw", "RGB;L")
                lines = np.frombuffer(strip, f"V{side}").reshape(-1, side, 3, columns).transpose(0, 3, 2, 1)
                pixels = np.ascontiguousarray(lines).view(np.uint8).reshape(part.shape).astype(np.float32)
                np.divide(pixels / 255 - mean, std, out=part)
            done[key] = patches
        return {"pixel_values": torch.from_numpy(pixel_values), "image_grid_hws": torch.tensor(grids)}

    def grid_of(self, height: int, width: int, name: str = "image") -> tuple[int, int]:
        """Rows and columns of patches that an image of `height`×`width` pixels has after preprocessing.

        Raises:
            ValueError: 512 patches or more a side. The message begins with `name`.
        """
        sides = zip(self._shrink(height, width), self.merge_kernel_size, strict=True)
        rows, columns = (-(-side // (merge * self.patch_size)) * merge for side, merge in sides)
        if max(rows, columns) >= MAX_PATCHES_PER_SIDE:
            made = f"{width}×{height} pixels make {columns}×{rows} patches"
            raise ValueError(f"{name}: {made}; expected fewer than {MAX_PATCHES_PER_SIDE} a side.")
        return rows, columns

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Patches of an image of `height`×`width` pixels, by transformers' name. No `images_kwargs` change it."""
        return prod(self.grid_of(height, width))

    def get_number_of_image_tokens(self, height: int, width: int) -> int:
        """Image tokens, one for each merge of patches, of an image of `height`×`width` pixels."""
        return prod(self.grid_of(height, width)) // prod(self.merge_kernel_size)

    def _shrink(self, height: int, width: int) -> tuple[int, int]:
        patches = (width // self.patch_size) * (height // self.patch_size)
        scale = min(1.0, (self.in_token_limit / max(1, patches)) ** 0.5)
        return max(1, int(height * scale)), max(1, int(width * scale))


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
