# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""What a scan finds, and the folder it is kept in: a line for each answer, written as it comes, and a manifest.

`results.jsonl` holds the lines. Several processes append to a part of their own each, `results-<n>.jsonl`, and the
last one to end merges the parts; all readers here take parts and whole alike. docs/results.schema.json describes a
line, docs/scan.md the folder.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: two scans at once into one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

RESULTS, MANIFEST, LOCK = "results.jsonl", "manifest.json", ".lock"
MERGING = 60.0  # seconds that a process waits for another one to merge
KIND = "locateanything-scan"  # tells our manifest.json from everybody else's


@dataclass(frozen=True)
class Detection:
    """One thing found.

    label: the model's word for it. class_id: the index of that query among its picture's, -1 where nothing was asked
    for. box: (x_min, y_min, x_max, y_max), or point: (x, y), in pixels of the upright picture; the other is None.
    score, label_score: in [0, 1], as `post_process_grounding` gives them.
    """

    label: str
    class_id: int
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None
    score: float | None = None
    label_score: float | None = None


@dataclass(frozen=True)
class Record:
    """One question about one picture, answered or failed.

    source: path, URL without credentials, or name of the row. frame, time: of a video's frame, its index and seconds.
    status: "ok" or "error", then with its `error`. width, height: pixels, None where the picture could not be read.
    text: the answer as the model gave it. finish_reason: "end", "limit" (it is cut off), "stop", "repetition" or
    "error". tokens: of the answer. mode: generation mode. seconds: from entering the engine to the end. id: the
    `custom_id` of its line, where the source is a list of requests.
    """

    source: str
    frame: int | None
    time: float | None
    query: str
    task: str
    status: str
    error: str | None = None
    width: int | None = None
    height: int | None = None
    detections: tuple[Detection, ...] = ()
    text: str | None = None
    finish_reason: str | None = None
    tokens: int = 0
    mode: str | None = None
    seconds: float | None = None
    id: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields in order; tuples are lists in JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Record":
        """The record of a line; keys that it does not know are left out."""
        known = {name: line[name] for name in cls.__dataclass_fields__ if name in line}
        return cls(**{**known, "detections": tuple(_detection(found) for found in line["detections"])})

    @property
    def key(self) -> bytes:
        """What makes it the answer to that question and no other: 16 bytes, as a scan of millions remembers each."""
        return key_of(self.source, self.frame, self.query, self.task, self.id)


def key_of(source: str, frame: int | None, query: str, task: str, id: str | None = None) -> bytes:
    return blake2b(json.dumps([source, frame, query, task, id]).encode(), digest_size=16).digest()


def read_records(folder: str | Path) -> Iterator[Record]:
    """The records of a scan's folder in the order in which they were answered, of a scan that still runs too."""
    for _, line in _answers(Path(folder)):
        yield Record.from_json(json.loads(line))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What the scan in a folder was asked and by what it was answered: `model`, `sources`, `settings`, `versions`.

    Raises:
        FileNotFoundError: no scan wrote into this folder.
        ValueError: its manifest.json is not a scan's.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ValueError(f"{path}: is not the manifest of a scan.")
    return manifest


def detections(found: Mapping[str, Any], class_id: int) -> Iterator[Detection]:
    """Boxes, then points, of a picture's `post_process_grounding`. class_id: of the labels that are no query."""
    for kind, places, prefix in (("box", "boxes", ""), ("point", "points", "point_")):
        own = found.get(f"{prefix}class_ids", [-1] * len(found[places]))
        columns = (found[name].tolist() for name in (places, f"{prefix}scores", f"{prefix}label_scores"))
        for label, number, at, *scores in zip(found[f"{prefix}labels"], map(int, own), *columns, strict=True):
            score, label_score = (None if math.isnan(score) else round(score, 4) for score in scores)
            place: dict[str, Any] = {kind: tuple(round(side, 2) for side in at)}
            yield Detection(label, class_id if number == -1 else number, **place, score=score, label_score=label_score)


def check(folder: Path, manifest: Mapping[str, Any], *, restart: bool = False) -> None:
    """Refuses a folder that is neither new nor empty nor the scan's of this manifest.

    Args:
        restart: any scan's will do.

    Raises:
        ValueError: it is none of these. The message begins with the setting that differs.
    """
    if (folder / MANIFEST).exists():
        then, now = (_flat(each) for each in (read_manifest(folder), manifest))
        for name in [] if restart else [*then, *(now.keys() - then.keys())]:
            values = now.get(name), then.get(name)
            if values[0] != values[1] and (name != "revision" or None not in values):
                new, old = (text if len(text := repr(value)) < 80 else f"{text[:77]}..." for value in values)
                raise ValueError(
                    f"{name}: got {new}, but {folder} holds the answers for {old}; name another, or restart."
                )
    elif folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
        raise ValueError(f"out: {folder} is there, and no scan's; expected a new or empty folder, or a scan's.")


def _flat(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What may not change from run to run."""
    return {**{name: manifest.get(name) for name in ("model", "revision", "sources")}, **manifest["settings"]}


class Results:
    """A scan's folder, open for one process to write into.

    Args:
        folder: made if missing. manifest: `model`, `revision`, `sources`, `settings` and `versions` of the scan.
        process, processes: which of how many this is.
        retry_failed: questions that failed count as not asked. restart: all do, and what the folder says is forgotten.

    Raises:
        ValueError: the folder is not this scan's (`check`).
        BlockingIOError: another scan writes into it now.
    """

    def __init__(
        self,
        folder: str | Path,
        manifest: Mapping[str, Any],
        process: int = 0,
        processes: int = 1,
        *,
        retry_failed: bool = False,
        restart: bool = False,
    ):
        self.folder = Path(folder)
        check(self.folder, manifest, restart=restart)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / (RESULTS if processes == 1 else f"results-{process}.jsonl")
        self._lock: BinaryIO = open(self.folder / LOCK, "ab")  # noqa: SIM115, closed in `close`
        try:
            # Another of the processes, one that had little left to ask, may be merging already
            _hold(self._lock, shared=processes > 1, patience=MERGING * (processes > 1))
            if restart or not (self.folder / MANIFEST).exists():
                scratch = self.folder / f".{MANIFEST}.{os.getpid()}"
                text = json.dumps({"kind": KIND, **manifest}, indent=2, ensure_ascii=False)
                scratch.write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")
                scratch.replace(self.folder / MANIFEST)
            for path in parts(self.folder) if restart else ():
                path.unlink()
            self._file: BinaryIO = open(self.path, "ab", buffering=0)  # noqa: SIM115
            _hold(self._file)
        except BlockingIOError:
            raise BlockingIOError(f"out: {self.folder}: another scan writes into it now.") from None
        os.truncate(self.path, sum(map(len, _lines(self.path))))  # a line that a kill has torn
        answers = ((json.loads(line), key) for key, line in _answers(self.folder))
        self.done = {key for answer, key in answers if not (retry_failed and answer["status"] == "error")}

    def write(self, record: Record) -> None:
        """Appends a line. One that does not fit on the disk is taken back whole.

        Raises:
            OSError: it cannot be written.
        """
        # A name of a file that is no UTF-8 holds surrogates: \udcff is how JSON writes them
        line = json.dumps(record.to_json(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            os.truncate(self.path, size)
            raise

    def close(self) -> bool:
        """Merges the parts and returns True, or False where another process still writes its own."""
        self._file.close()
        with self._lock:
            try:
                _hold(self._lock)
            except BlockingIOError:
                return False
            merge(self.folder)
            return True


def merge(folder: Path) -> None:
    """Makes results.jsonl the only part, each question in it once."""
    files = parts(folder)
    if files == [folder / RESULTS] and sum(1 for _ in _lines(files[0])) == sum(1 for _ in _answers(folder)):
        return
    scratch = folder / f".{RESULTS}"
    try:
        with open(scratch, "wb") as file:
            file.writelines(line for _, line in _answers(folder))
        scratch.replace(folder / RESULTS)
    finally:
        scratch.unlink(missing_ok=True)
    for path in files:
        if path.name != RESULTS:
            path.unlink()


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("results.jsonl")) + sorted(folder.glob("results-*.jsonl"))


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines of a part: the last one is torn where the process was killed in it, or is just being written."""
    with open(path, "rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _hold(file: BinaryIO, shared: bool = False, patience: float = 0.0) -> None:
    """Locks a file until it is closed, or raises BlockingIOError after `patience` seconds."""
    end = time.monotonic() + patience
    while fcntl:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)


def _answers(folder: Path) -> Iterator[tuple[bytes, bytes]]:
    """Each question's key and line: of several an "ok" one, and the latest. Only their places are kept in memory."""
    files = parts(folder)
    best: dict[bytes, tuple[bool, int, int]] = {}
    for number, path in enumerate(files):
        for place, line in enumerate(_lines(path)):
            try:
                told = json.loads(line)
                key = key_of(*(told[name] for name in ("source", "frame", "query", "task", "id")))
                rank = told["status"] == "ok", number, place
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {place + 1}: is not a record of a scan ({error}).") from error
            best[key] = max(rank, best.get(key, rank))
    chosen = {rank[1:]: key for key, rank in best.items()}
    for number, path in enumerate(files):
        for place, line in enumerate(_lines(path)):
            if (number, place) in chosen:
                yield chosen[number, place], line


def _detection(found: Mapping[str, Any]) -> Detection:
    known = {name: found[name] for name in Detection.__dataclass_fields__ if name in found}
    places: dict[str, Any] = {name: tuple(known[name]) for name in ("box", "point") if known.get(name) is not None}
    return Detection(**{**known, **places})
