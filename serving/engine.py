# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Between the event loop and the engine's thread: requests to rows, rows' outputs back to who waits for them."""

import asyncio
import logging
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from scan.records import detections
from scan.workers import give_way, row_of

from .images import Limits, decode, read
from .openai import APIError, refusal

WORKERS = 2  # threads that decode pictures and make them patches


class StopTexts(StoppingCriteria):
    """Ends a row whose answer holds one of some texts, at the token that completes it. (transformers' own goes through
    the whole vocabulary for each new set of texts, which strangers may send.)"""

    def __init__(self, stops: Sequence[str], processor: Any, prompt_length: int):
        self.stops, self.processor, self.prompt_length = stops, processor, prompt_length
        self.tail = 4 * max(map(len, stops)) + 1  # a token is at least a byte, a character at most four

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = input_ids[:, self.prompt_length :][:, -self.tail :].tolist()
        texts = [self.processor.decode(ids, skip_special_tokens=True) for ids in tails]
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


class Engine:
    """A model that answers requests.

    Args:
        model, processor: as of `load_apart`, or of `load`: in this process.
        rows: decoded at a time. waiting: rows beyond those that may wait; more are refused. limits: of a request.
    """

    on_failure: Callable[[], None] = staticmethod(lambda: None)  # called once, when the engine's thread has died

    def __init__(self, model: Any, processor: Any, *, rows: int, waiting: int, limits: Limits):
        self.model, self.processor, self.limits = model, processor, limits
        self.most, self.admitted, self.failed = rows + waiting, 0, False  # rows that are being answered or wait
        self.manager = model.init_continuous_batching(max_batch_rows=rows, max_queue_size=self.most)
        self.workers = ThreadPoolExecutor(WORKERS, "pictures", give_way)
        # Requests whose pictures lie in memory as pixels; the others wait as they came
        self.places = asyncio.Semaphore(rows + 2 * WORKERS)
        self.mail: deque[tuple[Job, int, Any]] = deque()  # from the engine's thread
        self.criterion = model.degenerate_answer_criteria()
        self.box_end = processor.tokenizer.convert_tokens_to_ids("</box>")

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.manager.start()

    def stop(self) -> None:
        self.manager.stop(block=True, timeout=self.limits.seconds)
        self.workers.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admission(self, rows: int) -> Iterator[None]:
        """A request of so many rows is counted while it lasts.

        Raises:
            APIError: 429, there are too many already.
        """
        if self.admitted + rows > self.most:
            raise APIError(429, f"busy: {self.admitted} rows are being answered or wait", code="rate_limit_exceeded")
        self.admitted += rows
        try:
            yield
        finally:
            self.admitted -= rows

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of an answer: the tokens that carry it are kept, end of turn and padding dropped."""
        return self.processor.decode(ids, skip_special_tokens=True)

    # ---- requests → rows

    async def _fetched(self, source: str | bytes) -> str | bytes:
        """What an http(s) address gives, had in a thread that may wait; what came with the request as it is."""
        came = isinstance(source, bytes) or source[:5].lower() == "data:"
        return source if came else await asyncio.to_thread(read, str(source), self.limits)

    async def chat_row(self, conversation: list[dict[str, Any]]) -> dict[str, Any]:
        """The row of a conversation whose images are URLs.

        Raises:
            ValueError: as `read`, `decode` and the processor do.
        """
        for item in _images(conversation):
            item["image"] = await self._fetched(item["image"])
        return await self.loop.run_in_executor(self.workers, self._row, conversation)

    async def locate_rows(self, source: str | bytes, queries: Sequence[str], task: str) -> tuple[list[Any], Any]:
        """A row for each query about a picture (or one, without any), all with the very same pixels; the picture."""
        return await self.loop.run_in_executor(self.workers, self._rows, await self._fetched(source), queries, task)

    def _decoded(self, source: str | bytes | Image.Image) -> Image.Image:
        if isinstance(source, Image.Image):
            return source
        return decode(read(source, self.limits) if isinstance(source, str) else source, self.limits)

    def _row(self, conversation: list[dict[str, Any]]) -> dict[str, Any]:
        for item in _images(conversation):
            item["image"] = self._decoded(item["image"])
        processor = self.processor
        match conversation:
            case [{"role": "user", "content": [{"image": picture}, {"text": text}]}]:
                return row_of(processor, text, dict(processor.image_processor(picture, return_tensors="pt")))
        told = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        row = processor.apply_chat_template(conversation, **told)
        return {**row, "input_ids": row["input_ids"][0].tolist()}

    def _rows(self, source: Any, queries: Sequence[str], task: str) -> tuple[list[dict[str, Any]], Image.Image]:
        picture, processor = self._decoded(source), self.processor
        if any("<image-" in query for query in queries):
            raise ValueError("queries: one says where a picture stands; expected what to look for.")
        asked = [processor.build_question(task, query) for query in queries] or [processor.build_question(task)]
        pixels = dict(processor.image_processor(picture, return_tensors="pt"))
        return [row_of(processor, question, pixels) for question in asked], picture

    # ---- rows → outputs

    def submit(self, rows: Sequence[dict[str, Any]], *, streaming: bool) -> "Job":
        """Rows for the engine, each the processor's output and what `generate` takes for a row.

        Raises:
            ValueError: one that the engine refuses. APIError: 500, the engine has failed; 429, rows of clients that
                left are still in its queue.
        """
        job = Job(self)
        try:
            for index, row in enumerate(rows):
                row = {**row, "streaming": streaming, "result_handler": partial(self._post, job, index)}
                job.open[index] = self.manager.add_request(**row, block=False)
        except RuntimeError as error:
            raise self.failure(error) from error
        except ValueError:
            job.cancel()
            raise
        except queue.Full as error:
            job.cancel()
            raise APIError(429, f"busy: {error}", code="rate_limit_exceeded") from error
        return job

    def _post(self, job: "Job", index: int, output: Any) -> None:
        """In the engine's thread. The loop is woken once for all that it has not taken."""
        self.mail.append((job, index, output))
        if len(self.mail) == 1:
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self.mail:
            job, index, output = self.mail.popleft()
            job.outputs.put_nowait((index, output))

    def failure(self, error: Any) -> APIError:
        """The engine's thread has died: whoever runs the server is told, and the client."""
        if not self.failed:
            self.failed = True
            logging.getLogger("serving").error("the engine has failed: %s", error)
            self.on_failure()
        return APIError(500, "the engine has failed; this server ends")

    def detections(self, output: Any, size: tuple[int, int], class_id: int) -> list[dict[str, Any]]:
        """What an output has found in a picture of `size` (width, height), as JSON: its boxes, then its points."""
        [row] = self.processor.post_process_grounding([output], target_sizes=[size[::-1]])
        return [asdict(found) for found in detections(row, class_id)]


class Job:
    """The rows of one request in the engine: iterate for (row, output), `cancel` what is not finished."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.outputs: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self.open: dict[int, str] = {}  # ids of rows that are not finished

    async def __aiter__(self) -> AsyncIterator[tuple[int, Any]]:
        while self.open:
            index, output = await self.outputs.get()
            if output.is_finished():
                self.open.pop(index, None)
            if output.error is not None and output.error.startswith("ValueError: ") and not output.prompt_ids:
                raise refusal(output.error.partition(" ")[2])  # of a process, which cannot refuse it at once
            if output.error is not None and self.engine.manager.is_running():
                raise APIError(500, f"the answer broke off: {output.error}")
            if output.error is not None:
                raise self.engine.failure(output.error)
            yield index, output

    def cancel(self) -> None:
        for request_id in self.open.values():
            self.engine.manager.cancel_request(request_id)
        self.open.clear()


def _images(conversation: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (item for turn in conversation for item in turn["content"] if item["type"] == "image")
