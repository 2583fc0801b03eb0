# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Pictures and frames, in whatever form they come: each becomes a PIL image in RGB."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote, unquote_to_bytes
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image

URL_TIMEOUT = 30.0  # seconds, for the connection and then for the whole download
MAX_DOWNLOAD = 256 * 2**20  # bytes
MAX_NESTING = 4  # dicts in dicts: an item, its image_url, and room
UNTYPED = ("application/octet-stream", "binary/octet-stream")  # what servers say that do not know
SOURCE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")
_EXPECTED = "a PIL image, an array or tensor, a path, a URL, a data URI, bytes, or a dict of one of " + ", ".join(
    SOURCE_KEYS
)


def load_image(source: Any) -> Image.Image:
    """Reads one picture (checkpoint.md, "Image preprocessing"). The pixels are in memory when it returns.

    Transparency of RGBA is composited on white; every other mode is what `Image.convert("RGB")` makes of it, and an
    EXIF orientation is not applied: both as the published processor does.

    Args:
        source: one of
            a PIL image of any mode;
            a numpy array or torch tensor `[H, W]`, `[H, W, C]` or `[C, H, W]` with C of 1, 3 or 4 (RGBA), uint8 or
            floating point in 0…1; where both layouts are possible an array is read as HWC and a tensor as CHW;
            a path (str or PathLike), a `file://`, `http://` or `https://` URL, a `data:` URI;
            the bytes of an image file;
            a dict with one of the keys `image`, `image_url`, `url`, `path`, `base64`, `bytes`.

    Returns:
        A new RGB image, sized as the source is.

    Raises:
        ValueError: the source has no pixels, cannot be read, is too large (PIL's decompression-bomb limit, or
            256 MiB to download), is declared as another type than an image (a data URI, a server's answer), is
            PostScript (which PIL gives to another program to run), or is none of the above. The message names it.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, f"a PIL image of mode {source.mode}")
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(source), f"{len(source)} bytes")
    if isinstance(source, os.PathLike):
        return _from_path(Path(source))
    if isinstance(source, str):
        return _from_text(source)
    if _is_array(source):
        return _from_array(source)
    raise ValueError(f"image: got {type(source).__name__}; expected {_EXPECTED}.")


def load_video(source: Any) -> list[Image.Image]:
    """Reads a video given as frames.

    Args:
        source: a list or tuple of anything `load_image` takes, or an array or tensor `[frames, H, W, C]` or
            `[frames, C, H, W]`, uint8 or floating point; floating point is in 0…1, or, if any value is above 1, in
            0…255 with fractions dropped (what torchvision's reader gives).

    Returns:
        The frames as RGB images.

    Raises:
        ValueError: no frames, a frame that `load_image` refuses, or a video file: no decoder is shipped.
    """
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError("video: got an empty list; expected at least one frame.")
        frames = []
        for index, frame in enumerate(source):
            try:
                frames.append(load_image(frame))
            except ValueError as error:
                raise ValueError(f"video frame {index}: {error}") from error
        return frames
    if _is_array(source):
        if source.ndim != 4 or 0 in source.shape:
            raise ValueError(
                f"video: got an array of shape {list(source.shape)}; expected [frames, H, W, C] or [frames, C, H, W]."
            )
        channels_first = _channels_first(tuple(source.shape[1:]), prefer=_is_tensor(source))
        pixels = _to_uint8(_to_numpy(source), above_one=True)
        return [_from_pixels(frame, channels_first) for frame in pixels]
    if isinstance(source, (str, os.PathLike, bytes, Mapping)):
        name = shorten(source) if isinstance(source, (str, os.PathLike)) else type(source).__name__
        raise ValueError(
            f"video: got {name}; no video decoder is shipped. Decode the file and pass its frames: a list of images, "
            "or an array [frames, H, W, C]."
        )
    raise ValueError(f"video: got {type(source).__name__}; expected a list of frames or a 4-D array.")


def shorten(source: Any, width: int = 100) -> str:
    """A source as an error message shows it: quoted, and cut where it is a long data URI."""
    text = str(source)
    return repr(text if len(text) <= width else f"{text[: width - 1]}…")


def _from_mapping(source: Mapping[str, Any], depth: int = 1) -> Image.Image:
    for key in SOURCE_KEYS:
        value = source.get(key)
        if value is None:
            continue
        if isinstance(value, Mapping):
            if depth == MAX_NESTING:
                raise ValueError(
                    f"image: got more than {MAX_NESTING} dicts in one another; expected an image in them."
                )
            return _from_mapping(value, depth + 1)
        if key == "base64" and isinstance(value, str) and not value.startswith("data:"):
            return _decode(io.BytesIO(_from_base64(value)), f"base64 {shorten(value, 40)}")
        return load_image(value)
    raise ValueError(f"image: got a dict with the keys {sorted(map(str, source))}; expected one of {SOURCE_KEYS}.")


def _from_text(source: str) -> Image.Image:
    scheme = source[:8].lower()
    if scheme.startswith("data:"):
        return _decode(io.BytesIO(_from_data_uri(source)), shorten(source))
    if scheme.startswith(("http://", "https://")):
        return _decode(io.BytesIO(_download(source)), shorten(source))
    if scheme.startswith("file://"):
        # Both spellings are in use: the plain path behind the scheme, and the percent-encoded one.
        plain = Path(source[len("file://") :])
        return _from_path(plain if _exists(plain) else Path(unquote(str(plain))))
    return _from_path(Path(source))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def _from_path(path: Path) -> Image.Image:
    if not _exists(path):
        raise ValueError(f"image {shorten(path)}: there is no such file.")
    if path.is_dir():
        raise ValueError(f"image {shorten(path)}: is a folder; expected an image file.")
    if not path.is_file():  # reading from a pipe or device may never end
        raise ValueError(f"image {shorten(path)}: is no regular file; expected an image file.")
    return _decode(path, shorten(path))


def _from_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ValueError(f"image {shorten(uri)}: a data URI has a comma before its data.")
    if not _is_image_type(header[len("data:") :]):
        raise ValueError(f"image {shorten(uri)}: is declared as another type; expected data:image/….")
    if header.lower().endswith(";base64"):
        return _from_base64(unquote(payload))
    try:
        return unquote_to_bytes(payload)
    except UnicodeEncodeError as error:
        raise ValueError(f"image {shorten(uri)}: its data are not text ({error.reason}).") from error


def _is_image_type(declared: str) -> bool:
    """Whether a MIME type is an image's, or says nothing."""
    kind = declared.partition(";")[0].strip().lower()
    return not kind or kind.startswith("image/") or kind in UNTYPED


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image {shorten(text, 40)}: not valid base64 ({error}).") from error


def _download(url: str) -> bytes:
    try:
        return _fetch(url)
    except HTTPError as error:
        raise ValueError(f"image {shorten(url)}: the server answered {error.code} {error.reason}.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"image {shorten(url)}: cannot be downloaded ({error}).") from error


def _fetch(url: str) -> bytes:
    request = Request(url, headers={"User-Agent": "LocateAnything-batched"})
    body = bytearray()
    with urlopen(request, timeout=URL_TIMEOUT) as response:
        kind = response.headers.get("Content-Type", "")
        if not _is_image_type(kind):
            raise OSError(f"sent as {shorten(kind, 40)}; expected an image")
        deadline = time.monotonic() + URL_TIMEOUT
        # read1 returns what has arrived, so that a server that drips bytes meets the deadline too.
        while chunk := response.read1(2**16):
            body += chunk
            if len(body) > MAX_DOWNLOAD:
                raise OSError(f"larger than {MAX_DOWNLOAD} bytes")
            if time.monotonic() > deadline:
                raise OSError(f"not complete within {URL_TIMEOUT:g} s")
        if response.length:
            raise OSError(f"the connection closed {response.length} bytes early")
    return bytes(body)


def _decode(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        image = Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"image {name}: not an image file that PIL can read.") from error
    except Exception as error:  # the format plugins raise whatever a broken header leads to
        raise ValueError(f"image {name}: cannot be read ({error}).") from error
    with image:
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"image {name}: is {image.width}×{image.height} pixels; a side of zero has no content.")
    if getattr(image, "format", None) == "EPS":  # PIL would start Ghostscript on it
        raise ValueError(f"image {name}: is PostScript, a program; expected a picture of pixels.")
    try:
        if image.mode == "RGBA":
            canvas = Image.new("RGB", image.size, (255, 255, 255))
            canvas.paste(image, mask=image.getchannel("A"))
            return canvas
        return image.convert("RGB")
    except Exception as error:  # decoding is lazy: a truncated or broken file shows only here, by any exception
        raise ValueError(f"image {name}: its pixels cannot be read ({error}).") from error


def _is_tensor(source: Any) -> bool:
    # Asked without importing torch, which takes seconds that a script's usage message need not wait for.
    return type(source).__module__.partition(".")[0] == "torch" and hasattr(source, "detach")


def _is_array(source: Any) -> bool:
    return isinstance(source, np.ndarray) or _is_tensor(source)


def _to_numpy(source: Any) -> np.ndarray:
    if not _is_tensor(source):
        return source
    try:
        tensor = source.detach().cpu()
        # numpy has no bfloat16
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:  # sparse, quantised, on the meta device
        raise ValueError(f"image: got a tensor whose values cannot be read ({error}).") from error


def _from_array(source: Any) -> Image.Image:
    shape = tuple(source.shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"image: got an array of shape {list(shape)}; expected [H, W], [H, W, C] or [C, H, W].")
    channels_first = len(shape) == 3 and _channels_first(shape, prefer=_is_tensor(source))
    return _from_pixels(_to_uint8(_to_numpy(source), above_one=False), channels_first)


def _channels_first(shape: tuple[int, ...], prefer: bool) -> bool:
    first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
    if not first and not last:
        raise ValueError(f"image: got an array of shape {list(shape)}; expected 1, 3 or 4 channels, first or last.")
    return prefer if first and last else first


def _to_uint8(pixels: np.ndarray, above_one: bool) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"image: got an array of {pixels.dtype}; expected uint8, or floating point in 0…1.")
    low, high = float(pixels.min()), float(pixels.max())
    if above_one and high > 1:
        if not (low >= 0 and high <= 255):
            raise ValueError(f"video: got values from {low:g} to {high:g}; expected 0…1 or 0…255.")
        return pixels.astype(np.uint8)
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(f"image: got values from {low:g} to {high:g}; floating point is expected in 0…1.")
    return np.rint(pixels * 255).astype(np.uint8)


def _from_pixels(pixels: np.ndarray, channels_first: bool) -> Image.Image:
    if channels_first:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return _to_rgb(image, f"an array of shape {list(pixels.shape)}")


__all__ = ["load_image", "load_video", "shorten"]
