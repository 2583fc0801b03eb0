# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Items → questions → rows, read and preprocessed by threads ahead of the engine; its outputs → records."""

import math
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from threading import get_native_id
from typing import Any

from PIL import Image

from .records import Record, detections, key_of
from .sources import SEPARATOR, Item, read_items

WAITING = 32  # rows before the engine, as many as it takes at a time; each holds its picture
REMEMBERED = 200  # characters of a question, at most, whose tokens are kept for the next picture
WORKERS = min(8, os.cpu_count() or 1)  # threads that read and preprocess pictures
VERBATIM = "prompt"  # the task of a question that was given whole and is none of the model's own


@dataclass(frozen=True)
class Question:
    """One question about one picture. text: a whole one, to be asked as it is. classes: what its `class_id`s count."""

    item: Item
    query: str
    task: str
    classes: tuple[str, ...] = ()
    text: str = ""

    @property
    def key(self) -> bytes:
        return key_of(self.item.source, self.item.frame, self.query, self.task, self.item.id)


@dataclass(frozen=True)
class Prepared:
    """A question with the row that asks it, or with the error that keeps it from that. size: (width, height)."""

    question: Question
    row: dict[str, Any] | None = None
    size: tuple[int, int] | None = None
    error: str | None = None


class Interviewer:
    """What is asked of each picture, and how the answers are read.

    Args:
        processor: of the model. queries, task: what is asked where an item brings no questions of its own.
        threshold: detections that score lower are left out. mode: as records tell it.

    Raises:
        ValueError: a query or task that is none.
    """

    def __init__(
        self, processor: Any, queries: Sequence[str], task: str, threshold: float = 0.0, mode: str = "hybrid"
    ):
        self.processor, self.queries, self.task = processor, tuple(queries), task
        self.threshold, self.mode = threshold, mode
        for query in self.queries:
            text = {"type": "text", "text": processor.build_question(task, query)}
            processor.apply_chat_template([{"role": "user", "content": [text]}], tokenize=False)

    def questions(self, item: Item) -> list[Question]:
        if item.prompt is not None:
            task, query = self._read_prompt(item.prompt)
            classes = tuple(filter(None, query.split(SEPARATOR))) if task != VERBATIM else ()
            return [Question(item, query, task, classes, item.prompt)]
        queries = self.queries if item.queries is None else item.queries
        # the text task asks for all text without a query; any other has nothing to ask, which is an error
        return [Question(item, query, self.task, queries) for query in queries or [""]]

    def prepare(self, item: Item, questions: Sequence[Question]) -> list[Prepared]:
        """The rows of a picture's questions. Whatever is wrong with it is told in them: threads must not end of it."""
        image: Any = None
        try:
            image = item.load()
            pixels = dict(self.processor.image_processor(image, return_tensors="pt"))
        except Exception as error:
            return [Prepared(question, size=image and image.size, error=str(error)) for question in questions]
        return [self._row(question, pixels, image.size) for question in questions]

    def record(self, prepared: Prepared, output: Any = None) -> Record:
        """The record of a question, of its `GenerationOutput` or of the error that kept it from being asked."""
        question, error = prepared.question, prepared.error or output.error
        item, (width, height) = question.item, prepared.size or (None, None)
        told: dict[str, Any] = {"source": item.source, "frame": item.frame, "time": item.time, "id": item.id}
        told |= {"query": question.query, "task": question.task, "width": width, "height": height, "mode": self.mode}
        if prepared.error is None:
            text = self.processor.decode(output.generated_tokens) if output.generated_tokens else ""
            told |= {"text": text.split(self.processor.tokenizer.eos_token)[0], "tokens": len(output.generated_tokens)}
            begin, end = output.lifespan
            told |= {"finish_reason": output.finish_reason, "seconds": None if begin < 0 else round(end - begin, 4)}
        if error is not None:
            error = re.sub(r"^(ValueError: |row 0: |images\[0\]: )+", "", error)  # it is the only one
            return Record(**{**told, "finish_reason": "error"}, status="error", error=error)
        (found,) = self.processor.post_process_grounding(
            [output],
            target_sizes=[(height, width)],
            threshold=self.threshold,
            queries=[list(question.classes)] if question.classes else None,
        )
        # a label that is no query answers the one that was asked
        own = question.classes.index(question.query) if question.query in question.classes else -1
        return Record(**told, status="ok", detections=tuple(detections(found, own)))

    def _row(self, asked: Question, pixels: dict[str, Any], size: tuple[int, int]) -> Prepared:
        try:
            text = asked.text or self.processor.build_question(asked.task, [asked.query] if asked.query else [])
            return Prepared(asked, row_of(self.processor, text, pixels), size)
        except Exception as error:
            return Prepared(asked, size=size, error=str(error))

    def _read_prompt(self, prompt: str) -> tuple[str, str]:
        """The task and the query of a question that the model was trained on."""
        for task in self.processor.tasks:
            before, _, behind = self.processor.build_question(task, "{}").partition("{}")
            if prompt.startswith(before) and prompt.endswith(behind) and len(prompt) > len(before + behind):
                return task, prompt[len(before) : len(prompt) - len(behind)]
        is_all_text = prompt == self.processor.build_question("text")
        return ("text", "") if is_all_text else (VERBATIM, prompt)


def row_of(processor: Any, question: str, pixels: dict[str, Any]) -> dict[str, Any]:
    """The row that asks a question about a picture. pixels: what the image processor makes of it; rows may share it.

    Raises:
        ValueError: the processor refuses the question.
    """
    around = _around if len(question) <= REMEMBERED else _around.__wrapped__
    before, behind = around(processor, question)
    slots = int(pixels["image_grid_hws"].prod()) // math.prod(processor.image_processor.merge_kernel_size)
    return {"input_ids": [*before, *[processor.image_token_id] * slots, *behind], **pixels}


@lru_cache(4096)
def _around(processor: Any, question: str) -> tuple[list[int], list[int]]:
    """The tokens before a picture's and behind: the same for each picture, as tokens never reach into its slots."""
    content = [{"type": "image", "image": Image.new("RGB", (28, 28))}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    (ids,) = processor.apply_chat_template([turns], add_generation_prompt=True, tokenize=True)
    slot = processor.image_token_id
    return ids[: ids.index(slot)], ids[len(ids) - ids[::-1].index(slot) :]


def give_way() -> None:
    """Called in a thread that prepares rows: the engine comes first where cores are few. Only Linux has that."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 10)


def scan(
    sources: Iterable[Any],
    queries: Sequence[str] = (),
    *,
    model: Any,
    processor: Any = None,
    task: str = "detect",
    threshold: float = 0.0,
    keep_repetitions: bool = False,
    fps: float | None = None,
    every: int = 1,
    done: set[bytes] | None = None,
    process: int = 0,
    processes: int = 1,
    **settings: Any,
) -> Generator[Record, None, None]:
    """Asks the queries about every picture of the sources, and yields the answers as they come.

    Memory is bounded by the engine's rows and its queue, but for 16 bytes a question.

    Args:
        sources, fps, every: as `read_items` takes them.
        queries: one question each, where a source brings none of its own.
        model: a folder or hub id, to be loaded in a process of its own (hub/engine_process.py), or a loaded model with
            its `processor`.
        task: which of the processor's `tasks` is asked.
        threshold: detections that score lower are left out.
        keep_repetitions: let answers that go round in circles run to their limit.
        done: `Record.key`s not to ask again; those of the questions asked are added.
        process, processes: which share of the pictures is asked about here.
        **settings: as `model.generate_batch` takes them for all rows, such as `generation_mode`, `max_new_tokens`;
            what goes to a process of its own must be picklable.

    Yields:
        A record for each question, "error" ones too: whatever is wrong with one picture, the rest goes on.

    Raises:
        ValueError: a query or a task that is none.
        RuntimeError: the engine cannot go on, as after a device's error.
    """
    if isinstance(model, (str, os.PathLike)):
        from hub.engine_process import load_apart  # here and not above, as it brings torch

        if "generator" in settings:
            raise ValueError("generator: rows of a model in another process cannot share it; expected a loaded model.")
        model, processor = load_apart(os.fspath(model))
        given: dict[str, Any] = {"task": task, "threshold": threshold, "keep_repetitions": keep_repetitions}
        given |= {"fps": fps, "every": every, "done": done, "process": process, "processes": processes, **settings}
        with closing(model):
            yield from scan(sources, queries, model=model, processor=processor, **given)
        return
    interviewer = Interviewer(processor, queries, task, threshold, settings.get("generation_mode", "hybrid"))
    done = set() if done is None else done
    asked: dict[str, Prepared] = {}

    def work() -> Iterator[tuple[Item, list[Question]]]:
        for number, item in enumerate(read_items(sources, fps=fps, every=every)):
            if number % processes == process:
                questions = [one for one in interviewer.questions(item) if one.key not in done]
                done.update(one.key for one in questions)
                if questions:
                    yield item, questions

    def rows() -> Iterator[dict[str, Any]]:
        numbers = map(str, count())
        for prepared in ahead(pool, interviewer.prepare, work(), depth=2 * WORKERS):
            for one in prepared:
                number = next(numbers)
                asked[number] = replace(one, row=None)  # the engine knows best how long it needs the patches
                # One without a row fails in the engine, and so comes out in its turn
                yield {"request_id": number, **(one.row or {})}

    settings.setdefault("max_queue_size", WAITING)
    settings["stopping_criteria"] = [] if keep_repetitions else [model.degenerate_answer_criteria()]
    pool = ThreadPoolExecutor(WORKERS, "scan", give_way)
    try:
        failed: list[Record] = []  # in the engine: if that fails as a whole, they are no faults of their own
        with closing(model.generate_batch(rows(), stream=True, **settings)) as outputs:
            for output in outputs:
                record = interviewer.record(asked.pop(output.request_id), output)
                if output.error is not None and output.prompt_ids:
                    failed.append(record)
                    continue
                yield from failed
                failed.clear()
                yield record
        yield from failed
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(pool: ThreadPoolExecutor, function: Callable, calls: Iterable[tuple], *, depth: int) -> Iterator[Any]:
    """The results of a function as they are ready, with at most `depth` calls under way or not taken yet."""
    calls, running = iter(calls), set[Future]()
    while running := running | {pool.submit(function, *call) for call in islice(calls, depth - len(running))}:
        ready, running = wait(running, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in ready)


def draw_pictures(
    folder: Path, sources: Iterable[Any], *, most: int | None = None, fps: float | None = None, every: int = 1
) -> Iterator[str | None]:
    """Draws what a scan's folder holds on the pictures of its sources, or on the first few, into `folder/drawn`.

    Yields:
        For each picture with an answer None, or why it is not drawn.
    """
    from .drawing import colour_of, draw  # here and not above, as a scan that is a library need not draw
    from .formats import Dataset, Picture

    items: Iterable[Item] = read_items(sources, fps=fps, every=every)
    if most is not None:
        items = list(islice(items, most))
    data = Dataset(folder)
    colours = {name: colour_of(index) for index, name in enumerate(data.categories)}  # before threads ask for them
    left = set(data.answers) if most is None else {(item.source, item.frame) for item in items} & data.answers.keys()

    def work() -> Iterator[tuple[Item, Picture]]:
        """Answers come almost in the order of the pictures: those that come before their pictures wait for them."""
        waiting, pictures = dict[Any, Picture](), data.pictures()
        for item in items:
            if (key := (item.source, item.frame)) in left:
                while key not in waiting:
                    picture = next(pictures)
                    if (name := (picture.origin["source"], picture.origin["frame"])) in left:
                        waiting[name] = picture
                left.remove(key)
                yield item, waiting.pop(key)

    def one(item: Item, picture: Picture) -> str | None:
        path = folder / "drawn" / picture.file_name
        if path.suffix.lower() not in (".bmp", ".jpeg", ".jpg", ".webp"):
            path = path.with_suffix(".png")
        scratch = path.with_name(f".{path.name}")
        try:
            if isinstance(item.image, str) and os.path.realpath(item.image) == os.path.realpath(path):
                raise ValueError(f"{path}: is a picture of the scan's; its drawing would be written over it")
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(item.load(), [one for _, one in picture.found], colours).save(scratch, quality=95)
            scratch.replace(path)
        except (OSError, ValueError) as error:
            scratch.unlink(missing_ok=True)
            return str(error)
        return None

    with ThreadPoolExecutor(WORKERS, "draw") as pool:
        yield from ahead(pool, one, work(), depth=2 * WORKERS)


def revision_of(model: str) -> str | None:
    """What tells a model's weights from later ones of the same name: of a hub id its commit, of a folder a digest of
    samples of them; None for a hub id that was never downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if not os.path.isdir(model):
        config = try_to_load_from_cache(model, "config.json")
        return Path(config).parent.name if isinstance(config, str) else None
    digest = blake2b(digest_size=16)
    for path in sorted(Path(model).glob("*.safetensors")):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size}".encode())
            for part in range(64):
                file.seek(size * part // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()
