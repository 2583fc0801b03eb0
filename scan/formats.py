# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""A scan's folder → files that other tools read: COCO, YOLO, Label Studio, CSV, Pascal VOC (docs/scan.md).

No picture is opened. It is called by its path below the folder that all lie in, a video's frame `video-000012.jpg`.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from .records import Detection, Record, read_manifest, read_records

Key = tuple[str, int | None]  # source and frame
ORIGIN = ("source", "frame", "time")
OURS = ".exported"  # in an exported folder: a digest of the rest, but for
THEIRS = "images"  # the pictures, where somebody puts them there to train
_json = partial(json.dumps, ensure_ascii=False)
_is_url = re.compile("data:|.*://").match
# Without what XML, and some readers of CSV, do not take
_legal = partial(re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]").sub, "\ufffd")


@dataclass
class Picture:
    """What was found in one picture, each with its category."""

    number: int
    name: str  # relative, without the suffix
    file_name: str
    size: tuple[int, int]  # width, height
    origin: dict[str, Any]  # of ORIGIN
    found: list[tuple[str, Detection]] = field(default_factory=list)


class Dataset:
    """The pictures of a scan of which at least one question was answered, and the categories of what was found.

    The categories are the scan's queries, so that a number is the `class_id`, and behind them the labels of what lists
    asked for. All text that is found, unasked, is "text". In memory are the pictures' names, not what was found.
    """

    def __init__(self, folder: str | Path):
        manifest = read_manifest(folder)
        self.folder, self.model = Path(folder), str(manifest["model"])
        self._queries = list(manifest["settings"].get("queries") or ())
        self.answers: Counter[Key] = Counter()
        self.has_points, names = False, set[str]()
        for record in read_records(folder):
            if record.status == "ok":
                self.answers[record.source, record.frame] += 1
                names.update(self._category(record, found) for found in record.detections)
                self.has_points |= any(found.point for found in record.detections)
        self.categories = {name: i for i, name in enumerate([*self._queries, *sorted(names - {*self._queries})])}
        keys = sorted(self.answers, key=lambda key: (key[0], key[1] or 0))
        try:
            self.root = os.path.commonpath({os.path.dirname(source) for source, _ in keys if not _is_url(source)})
        except ValueError:  # no files, or paths of several kinds
            self.root = os.sep
        self._names = {key: (i, *name) for i, (key, name) in enumerate(file_names(keys, self.root).items(), 1)}

    def pictures(self) -> Iterator[Picture]:
        """In the order in which their last questions were answered."""
        missing, begun = dict(self.answers), dict[Key, Picture]()
        for record in read_records(self.folder):
            key = record.source, record.frame
            if record.status == "ok" and missing.get(key):  # else a scan that still runs has answered meanwhile
                origin = {name: getattr(record, name) for name in ORIGIN}
                picture = Picture(*self._names[key], (record.width or 1, record.height or 1), origin)
                picture = begun.setdefault(key, picture)
                picture.found += [(self._category(record, found), found) for found in record.detections]
                for name, _ in picture.found:
                    self.categories.setdefault(name, len(self.categories))
                missing[key] -= 1
                if not missing[key]:
                    yield begun.pop(key)
        yield from begun.values()

    def _category(self, record: Record, found: Detection) -> str:
        if record.query in self._queries and 0 <= found.class_id < len(self._queries):
            return self._queries[found.class_id]
        return "text" if record.task == "text" and found.class_id < 0 else found.label or record.query or record.task


def file_names(pictures: Iterable[Key], root: str) -> dict[Key, tuple[str, str]]:
    """Of each picture a name without and one with a suffix, below `root`; no two are alike, in lower case either."""
    names, taken = dict[Key, tuple[str, str]](), dict[str, int]()
    for source, frame in pictures:
        path = source if root == os.sep else os.path.relpath(source, root)
        path = os.path.basename(unquote(urlsplit(source).path)) if _is_url(source) else path
        path = os.fsencode(path).decode(errors="replace").replace(os.sep, "/")
        stem, suffix = re.fullmatch(r"(.*?)(\.\w{1,5})?", path, re.DOTALL).groups("")  # type: ignore[union-attr]
        stem, suffix = (stem, suffix) if frame is None else (f"{stem}-{frame:06}", ".jpg")
        parts = [re.sub(r'[\\<>:"|?*\x00-\x1f]', "_", part) for part in stem.split("/") if part not in ("", ".", "..")]
        name = "/".join(part.encode()[:200].decode(errors="ignore") for part in parts) or "picture"  # most take 255
        stem = folded = name.casefold()
        while folded in taken:
            taken[stem] += 1
            folded = f"{stem}-{taken[stem]}"
        taken[folded] = 1
        name += folded.removeprefix(stem)
        names[source, frame] = name, f"{name}{suffix}"
    return names


def export(folder: str | Path, formats: Iterable[str]) -> list[Path]:
    """Writes what a scan found into `folder/<format>`, whole or not at all, and returns these folders.

    Args:
        folder: of a scan, also of one that still runs.
        formats: of `FORMATS`.

    Raises:
        ValueError: an unknown format, no scan's folder, or one of a format that was not exported or was changed since.
        OSError: it cannot be written; what was there is still there.
    """
    targets = [Path(folder) / name for name in dict.fromkeys(formats)]
    for target in targets:
        if target.name not in FORMATS:
            raise ValueError(f"formats: got {target.name!r}; expected some of {', '.join(FORMATS)}.")
        if target.exists() and (not (ours := target / OURS).is_file() or ours.read_text() != _state(target)):
            raise ValueError(f"{target}: was not exported, or was changed since; move it away to export.")
    data: Any = Dataset(folder) if targets else None
    for target in targets:
        with TemporaryDirectory(prefix=f".{target.name}-", dir=folder) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            FORMATS[target.name](new, data)
            (new / OURS).write_text(_state(new))
            if target.exists():
                if os.path.lexists(target / THEIRS):
                    (target / THEIRS).rename(new / THEIRS)
                target.rename(Path(scratch, "old"))
            new.rename(target)
    return targets


def _state(folder: Path) -> str:
    """A digest of the names, sizes and times of what is exported to a folder."""
    digest = blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.relative_to(folder).parts[0] not in (OURS, THEIRS) and not path.is_dir():
            told = path.lstat()
            digest.update(os.fsencode(f"{path.relative_to(folder)} {told.st_size} {told.st_mtime_ns}\n"))
    return digest.hexdigest()


def _coco(folder: Path, data: Dataset) -> None:
    def images() -> Iterator[dict[str, Any]]:
        for picture in data.pictures():
            told = {"id": picture.number, "file_name": picture.file_name, **picture.origin}
            yield {**told, "width": picture.size[0], "height": picture.size[1]}

    def annotations() -> Iterator[dict[str, Any]]:
        every = ((picture.number, *one) for picture in data.pictures() for one in picture.found)
        for number, (image, name, found) in enumerate(every, 1):
            x, y, right, bottom = _corners(found)
            wide, high = round(right - x, 2), round(bottom - y, 2)
            told = {"id": number, "image_id": image, "category_id": data.categories[name] + 1, "iscrowd": 0}
            shape = {"bbox": [x, y, wide, high], "area": round(wide * high, 2), "segmentation": []}
            point = {"keypoints": [x, y, 2], "num_keypoints": 1} if found.point else {}
            scores = {"score": found.score, "label_score": found.label_score}
            yield {**told, **shape, **point, "label": found.label, **scores}

    def categories() -> Iterator[dict[str, Any]]:
        more: dict[str, Any] = {"keypoints": ["point"], "skeleton": []} if data.has_points else {}
        yield from ({"id": number + 1, "name": name, **more} for name, number in data.categories.items())

    with _opened(folder / "annotations.json") as file:
        file.write(f'{{"info": {_json({"description": f"found by {data.model}"})}')
        for name, items in (("images", images()), ("annotations", annotations()), ("categories", categories())):
            file.write(f',\n"{name}": ')
            _write_list(file, items)
        file.write("}\n")


def _yolo(folder: Path, data: Dataset) -> None:
    """Where there are points, the format of poses: behind each box its point and a 2, or 0 0 0 for none."""
    with _opened(folder / "pictures.csv") as file:
        table = csv.writer(file)
        table.writerow(["file_name", *ORIGIN])
        for picture in data.pictures():
            table.writerow([picture.file_name, *picture.origin.values()])
            width, height = picture.size
            with _opened(folder / "labels" / f"{picture.name}.txt") as labels:
                for name, found in picture.found:
                    x, y, right, bottom = _corners(found)
                    middle = ((x + right) / 2 / width, (y + bottom) / 2 / height)
                    values = [*middle, (right - x) / width, (bottom - y) / height]
                    if data.has_points:
                        values += [*middle, 2] if found.point else [0, 0, 0]
                    labels.write(f"{data.categories[name]} {' '.join(f'{value:.6g}' for value in values)}\n")
    names = f"names: {_json(list(map(_legal, data.categories)))}\n"  # YAML has JSON's lists
    text = "train: images\nval: images\n" + ("kpt_shape: [1, 3]\n" if data.has_points else "") + names
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _labelstudio(folder: Path, data: Dataset) -> None:
    """Files are asked for below the name of the folder that all lie in, in the root that Label Studio is told."""

    def result(picture: Picture, number: int, name: str, found: Detection) -> dict[str, Any]:
        (width, height), kind = picture.size, "keypoint" if found.point else "rectangle"
        x, y, right, bottom = (100 * at / side for at, side in zip(_corners(found), (width, height) * 2, strict=True))
        value = {"width": 0.5} if found.point else {"width": right - x, "height": bottom - y, "rotation": 0}
        told: dict[str, Any] = {"type": f"{kind}labels", "from_name": kind, "to_name": "image", "image_rotation": 0}
        told |= {"original_width": width, "original_height": height, "score": found.score}
        told |= {"value": {"x": x, "y": y, **value, f"{kind}labels": [_legal(name)]}, "meta": {"text": [found.label]}}
        return {"id": f"{picture.number}-{number}", **told}

    def tasks() -> Iterator[dict[str, Any]]:
        for picture in data.pictures():
            image, path = picture.origin["source"], os.path.join(base, picture.file_name)
            if not image.startswith("http") or picture.origin["frame"] is not None:
                image = f"/data/local-files/?d={quote(path)}"
            told = [result(picture, number, *one) for number, one in enumerate(picture.found)]
            found = {"model_version": data.model, "result": told}
            yield {"data": {"image": image, **picture.origin}, "predictions": [found]}

    base = os.path.basename(os.path.abspath(data.root))
    with _opened(folder / "tasks.json") as file:
        _write_list(file, tasks())
    labels = "".join(f"<Label value={quoteattr(_legal(name))}/>" for name in data.categories)
    text = '<View><Image name="image" value="$image"/>'
    for tag in ("Rectangle", "KeyPoint"):
        text += f'<{tag}Labels name="{tag.lower()}" toName="image">{labels}</{tag}Labels>'
    (folder / "config.xml").write_text(f"{text}</View>\n", encoding="utf-8")


def _voc(folder: Path, data: Dataset) -> None:
    """Pixels count from 1, and a box holds those of its sides. A point is its pixel's box, and a `point` beside it."""
    for picture in data.pictures():
        root, (width, height) = ElementTree.Element("annotation"), picture.size
        at, file_name = os.path.split(picture.file_name)
        _add(root, folder=at, filename=file_name, source={"database": data.model, **picture.origin})
        _add(root, size={"width": width, "height": height, "depth": 3}, segmented=0)
        for name, found in picture.found:
            left, top, right, bottom = map(round, _corners(found))
            x, y = min(left, width - 1) + 1, min(top, height - 1) + 1
            box = {"xmin": x, "ymin": y, "xmax": max(x, right), "ymax": max(y, bottom)}
            told = {"name": name, "pose": "Unspecified", "truncated": 0, "difficult": 0, "bndbox": box}
            _add(root, object={**told, "point": {"x": x, "y": y} if found.point else None, "confidence": found.score})
        ElementTree.indent(root)
        with _opened(folder / "Annotations" / f"{picture.name}.xml") as file:
            file.write(ElementTree.tostring(root, encoding="unicode"))


def _csv(folder: Path, data: Dataset) -> None:
    """A line for each detection, and one without a label for a question that found nothing or failed."""
    head = [*ORIGIN, "query", "task", "status", "error", "finish_reason", "width", "height"]
    columns = ["label", "class_id", "score", "label_score", "x_min", "y_min", "x_max", "y_max", "x", "y"]
    with _opened(folder / "detections.csv") as file:
        table = csv.writer(file)
        table.writerow([*head, *columns])
        for record in read_records(data.folder):
            told = [_legal(value) if isinstance(value := getattr(record, name), str) else value for name in head]
            places = [[*(one.box or [None] * 4), *(one.point or [None] * 2)] for one in record.detections]
            found = [[_legal(one.label), one.class_id, one.score, one.label_score] for one in record.detections]
            for values in map(list.__add__, found, places) if found else [[None] * len(columns)]:
                table.writerow([*told, *values])


FORMATS = {"coco": _coco, "yolo": _yolo, "labelstudio": _labelstudio, "csv": _csv, "voc": _voc}


def _corners(found: Detection) -> tuple[float, float, float, float]:
    """The box, or one without extent about the point."""
    return found.box or (found.point or (0.0, 0.0)) * 2


def _opened(path: Path) -> TextIO:
    """A new file. A name of a file that is no UTF-8 is written as JSON does it, `\\udcff`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "w", encoding="utf-8", errors="backslashreplace", newline="")


def _write_list(file: TextIO, items: Iterable[Any]) -> None:
    file.write("[")
    for number, item in enumerate(items):
        file.write(f"{',' if number else ''}\n{_json(item)}")
    file.write("]")


def _add(parent: ElementTree.Element, **values: Any) -> None:
    """Adds an element for each value that there is, with those of a dict in it."""
    for name, value in values.items():
        if isinstance(value, dict):
            _add(ElementTree.SubElement(parent, name), **value)
        elif value is not None:
            ElementTree.SubElement(parent, name).text = _legal(str(value))
