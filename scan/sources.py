# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Every kind of source → items, one picture each, lazily and in natural order; what cannot be read is an item too."""

import csv
import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from .records import MANIFEST, read_manifest

PICTURES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
# The columns of a list that hold a picture, its questions and its name; the first that a line fills counts
IMAGE_COLUMNS = ("image", "image_path", "image_url", "path", "file_name", "file", "url")
QUERY_COLUMNS = ("queries", "query")
ID_COLUMNS = ("custom_id", "id")
SEPARATOR = "</c>"  # between the classes of one line
UNREADABLE = (OSError, ValueError, KeyError, TypeError, csv.Error)


@dataclass(frozen=True)
class Item:
    """One picture to ask about.

    source: its name in the results. image: what `load_image` takes, a decoded frame of a video, or the error that
    there is instead. queries: its own, or None for the scan's; prompt: a whole question, to be asked as it is. frame,
    time: of a video's frame, its index and seconds. id: the list's name for it.
    """

    source: str
    image: Any
    queries: tuple[str, ...] | None = None
    prompt: str | None = None
    frame: int | None = None
    time: float | None = None
    id: str | None = None

    def load(self) -> Image.Image:
        """The picture, upright and in RGB.

        Raises:
            ValueError: it cannot be read.
        """
        from image_processing import load_image  # here and not above, as it brings torch

        if isinstance(self.image, Exception):
            raise ValueError(str(self.image)) from self.image
        if self.frame is not None and hasattr(self.image, "to_image"):
            turned = getattr(self.image, "rotation", 0)  # degrees, as a telephone notes them
            image = self.image.to_image()
            return image.rotate(turned, expand=True) if turned else image
        return load_image(self.image, upright=True)


def read_items(sources: Iterable[Any], *, fps: float | None = None, every: int = 1) -> Iterator[Item]:
    """The pictures of the sources, one after the other; nothing is opened before its turn.

    Args:
        sources: each a file (picture, video, or .jsonl, .csv, .parquet with a picture a line), a folder with pictures
            and videos at any depth, a glob, a URL, a data URI, "-" for such lines on the standard input, an `Item`, or
            a PIL image.
        fps: frames a second to take of videos, at most. every: or each so many'th frame.
    """
    for number, source in enumerate(sources):
        if not isinstance(source, (str, os.PathLike)):
            yield source if isinstance(source, Item) else Item(f"image {number}", source)
        elif (text := os.fspath(source)) == "-":
            yield from read_items(_lines(sys.stdin.buffer), fps=fps, every=every)
        elif text[:5].lower() == "data:":
            yield Item(name_of(text), text)
        elif os.path.isdir(text):
            yield from read_items(_walk(text), fps=fps, every=every)
        elif _is_glob(text):
            found = sorted(glob.iglob(text, recursive=True), key=natural)
            yield from read_items(found, fps=fps, every=every)
            if not found:
                yield Item(text, FileNotFoundError(f"{text}: no file is named like this."))
        elif suffix_of(text) in VIDEOS:
            yield from _frames(text, fps, every)
        elif "://" in text:
            yield Item(name_of(text), text)
        elif read := LISTS.get(suffix_of(text)):
            yield from _items_of(text, read)
        else:
            yield Item(text, text)


def _is_glob(text: str) -> bool:
    return "://" not in text and not os.path.lexists(text) and glob.has_magic(text)


def read_list(path: str) -> Iterator[str]:
    """The sources that a file has a line each of; lazily."""
    with open(path, "rb") as file:
        yield from _lines(file)


def estimate(sources: Iterable[Any], *, fps: float | None = None, every: int = 1) -> int:
    """How many pictures `read_items` will make of the sources, by what lists and videos tell of themselves."""
    total = 0
    for source in sources:
        text = source if isinstance(source, str) else ""
        if os.path.isdir(text):
            total += estimate(_walk(text), fps=fps, every=every)
        elif _is_glob(text):
            total += estimate(glob.iglob(text, recursive=True), fps=fps, every=every)
        elif suffix_of(text) in VIDEOS:
            import av

            with av.open(text) as container:
                stream = container.streams.video[0]
                seconds = float(container.duration or 0) / av.time_base
                total += int(seconds * fps if fps else stream.frames or seconds * (stream.average_rate or 0)) // every
        elif "://" in text:
            total += 1
        elif suffix_of(text) == ".parquet":
            import pyarrow.parquet  # type: ignore[import-untyped]

            total += pyarrow.parquet.read_metadata(text).num_rows
        elif suffix_of(text) in LISTS:
            with open(text, "rb") as file:
                total += sum(1 for _ in file) - (suffix_of(text) == ".csv")
        else:
            total += 1
    return total


def name_of(source: str) -> str:
    """What the results call a source: of a URL neither credentials nor query, of a data URI no data; still its own."""
    digest = blake2b(os.fsencode(source), digest_size=8).hexdigest()
    if source[:5].lower() == "data:":
        return f"data:{source[5:].partition(',')[0][:40]},{digest}"
    if "://" not in source:
        return source
    parts = urlsplit(source)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return bare if bare == source else f"{bare}#{digest}"


def natural(text: str) -> list[Any]:
    """Sorts frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", text)]


def suffix_of(text: str) -> str:
    """The suffix of a path's or URL's file, in lower case and with its period."""
    return os.path.splitext(urlsplit(text).path if re.match("https?://", text) else text)[1].lower()


def _lines(file: Iterable[bytes]) -> Iterator[str]:
    yield from (text for line in file if (text := os.fsdecode(line).strip("\r\n")))


def _walk(folder: str) -> Iterator[str | Item]:
    """The pictures and videos below a folder. Hidden ones and the folders of scans are no pictures of the user's."""
    if _is_scan(folder):
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted((one for one in entries if one.name[0] != "."), key=lambda one: natural(one.name))
    except OSError as error:
        yield Item(folder, error)
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        elif suffix_of(entry.name) in PICTURES | VIDEOS:
            yield entry.path


def _is_scan(folder: str) -> bool:
    try:
        return os.path.exists(os.path.join(folder, MANIFEST)) and bool(read_manifest(folder))
    except (OSError, ValueError):
        return False


def _frames(source: str, fps: float | None, every: int) -> Iterator[Item]:
    name, index, last = name_of(source), -1, -1
    try:
        import av

        with av.open(source) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for index, frame in enumerate(container.decode(stream)):
                time = None if frame.time is None else round(frame.time, 6)
                turn = index if fps is None or time is None else int(time * fps + 1e-6)
                if turn != last and index % every == 0:
                    yield Item(name, frame, frame=index, time=time)
                    last = turn
    except ImportError as error:
        yield Item(name, ImportError(f"{name}: videos need PyAV; pip install av ({error})."))
    except (OSError, ValueError, IndexError) as error:  # PyAV's errors are these
        yield Item(name, ValueError(f"video {name!r}: cannot be read ({error})."), frame=index + 1)
    else:
        if index < 0:
            yield Item(name, ValueError(f"video {name!r}: has no frames."))


# ---- lists: files with a picture a line


def _items_of(path: str, read: Callable[[str], Iterator[Any]]) -> Iterator[Item]:
    """A line that cannot be read is an item with its error, as is the rest of a list that breaks off."""
    number = 0
    try:
        for number, line in enumerate(read(path), 1):
            try:
                yield _item(path, number, line() if callable(line) else line)
            except UNREADABLE as error:
                yield Item(f"{path}:{number}", ValueError(f"{path}, line {number}: {error}"))
    except ImportError as error:
        yield Item(path, ImportError(f"{path}: .parquet needs pyarrow; pip install pyarrow ({error})."))
    except UNREADABLE as error:
        yield Item(f"{path}:{number + 1}", ValueError(f"{path}: cannot be read behind line {number} ({error})."))


def _jsonl(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        yield from (lambda line=line: json.loads(line) for line in file if line.strip())


def _csv(path: str) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from csv.DictReader(file)


def _parquet(path: str) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        wanted = {*IMAGE_COLUMNS, *QUERY_COLUMNS, *ID_COLUMNS}
        columns = [name for name in file.schema_arrow.names if name in wanted]
        for batch in file.iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()


LISTS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _item(path: str, number: int, line: Any) -> Item:
    """The item of a line: `{"image": …, "query": "person</c>car"}`, or a request of vLLM's and OpenAI's batches."""
    if not isinstance(line, Mapping):
        raise ValueError(f"got {line!r:.80}; expected an object.")
    if isinstance(line.get("body"), Mapping):
        image, prompt = _message(line["body"])
        return Item(*_picture(path, number, image), prompt=prompt, id=_id(line))
    image = next((line[name] for name in IMAGE_COLUMNS if line.get(name)), None)
    if image is None:
        raise ValueError(f"has no picture: got {', '.join(map(str, line)):.80}; expected one of {IMAGE_COLUMNS}.")
    asked = next((line[name] for name in QUERY_COLUMNS if line.get(name)), None)
    texts = asked.split(SEPARATOR) if isinstance(asked, str) else asked
    if texts is not None and not (isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts)):
        raise ValueError(f"query: got {asked!r:.80}; expected a text, or a list of them.")
    queries = None if texts is None else tuple(dict.fromkeys(text.strip() for text in texts))
    return Item(*_picture(path, number, image), queries=queries, id=_id(line))


def _id(line: Mapping[str, Any]) -> str | None:
    return next((str(line[name]) for name in ID_COLUMNS if line.get(name) is not None), None)


def _picture(path: str, number: int, image: Any) -> tuple[str, Any]:
    """The name and the picture of a line. Paths are looked for beside the list too."""
    if isinstance(image, Mapping) and image.get("bytes") is None:  # as `datasets` writes them
        image = image.get("path") or image.get("url")
    if isinstance(image, str):
        beside = os.path.join(os.path.dirname(path), image)
        is_path = image[:5].lower() != "data:" and "://" not in image
        image = beside if is_path and not os.path.exists(image) and os.path.exists(beside) else image
        return name_of(image), image
    return f"{path}:{number}", image


def _message(body: Mapping[str, Any]) -> tuple[Any, str]:
    """The picture and the text of a request's only user message."""
    said = [message["content"] for message in body["messages"] if message["role"] != "system"]
    parts = [part for content in said for part in ([{"text": content}] if isinstance(content, str) else content)]
    images = [part["image_url"] for part in parts if part.get("image_url")]
    texts = [part["text"] for part in parts if part.get("text")]
    if len(said) != 1 or len(images) != 1 or len(texts) != 1:
        raise ValueError(
            f"got {len(said)} messages with {len(images)} pictures and {len(texts)} texts; expected one of each."
        )
    return (images[0]["url"] if isinstance(images[0], Mapping) else images[0]), texts[0]
