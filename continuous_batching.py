# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests come at any time, from any thread, and one engine answers them.

The names are transformers', whose own continuous batching serves text only. docs/api.md has examples.
"""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from .configuration import WINDOW
from .inputs import ROWS_A_STEP, check_number, read_call
from .rows import Row

EXPECTED_PLACES = 4096  # of a row, to tell how many fit into memory

logger = logging.get_logger(__name__)

_OPTIONS = {"max_batch_rows", "max_queue_size", "prefill_tokens", "prefill_patches"}
_OPTIONS |= {"decode_graphs", "compile", "share_images", "share_prefixes", "batch_invariant"}
Handler = Callable[["GenerationOutput"], Any]


class RequestStatus(IntEnum):
    PENDING, PREFILLING, DECODING, FINISHED, FAILED = range(5)


@dataclass
class GenerationOutput:
    """What is known of a request: all of it when it `is_finished`, of a streaming one also on the way.

    prompt_ids, generated_tokens: ids without padding. logprobs: of each generated token, under the distribution it was
    accepted from. accepted_by: of each, a `Phase` of decoding.py. row_forwards: decoding forwards it took part in.
    finish_reason: "end", "limit", "stop", "repetition" (`degenerate_answer_criteria` cut it: shorter than what was
    streamed), "error" or "cancelled". error: of a failed request, why; the tokens before it are there. created_time,
    lifespan: seconds of `time.perf_counter`, when it was added, entered a slot, and finished.
    """

    request_id: str
    prompt_ids: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: str | None = None
    status: RequestStatus = RequestStatus.PENDING
    created_time: float = field(default_factory=time.perf_counter)
    lifespan: tuple[float, float] = (-1, -1)
    finish_reason: str | None = None
    row_forwards: int = 0
    accepted_by: list[int] = field(default_factory=list)

    @classmethod
    def refused(cls, request_id: str, error: Exception) -> "GenerationOutput":
        """Of a request that never became a row."""
        text = f"{type(error).__name__}: {error}"
        return cls(request_id, error=text, status=RequestStatus.FAILED, finish_reason="error")

    def is_finished(self) -> bool:
        return self.status >= RequestStatus.FINISHED


@dataclass(eq=False)
class Request:
    row: Row
    streaming: bool
    created: float = field(default_factory=time.perf_counter)
    begun: float = -1
    told: int = 0  # tokens of its answer that were streamed

    def output(self) -> GenerationOutput:
        row, done = self.row, self.row.finish_reason is not None
        ended = RequestStatus.FINISHED if row.error is None else RequestStatus.FAILED
        self.told = len(row.answer)
        return GenerationOutput(
            request_id=str(row.index),
            prompt_ids=row.prompt,
            generated_tokens=row.answer,
            logprobs=row.scores[:],
            error=row.error,
            status=ended if done else RequestStatus.DECODING,
            created_time=self.created,
            lifespan=(self.begun, time.perf_counter() if done else -1),
            finish_reason=row.finish_reason,
            row_forwards=row.forwards,
            accepted_by=[int(phase) for phase in row.phases],
        )


class ContinuousBatchingManager:
    """Answers requests in a thread of its own; `model.init_continuous_batching` makes it. All methods may be called
    from any thread. Stop it before weights or adapters change: slots hold prompts that later ones share.

    Args:
        model: the drop-in. generation_config: for requests that bring none of their own.
        max_batch_rows: rows decoded at a time, as of `generate`.
        max_queue_size: requests that wait for a slot; when so many do, `add_request` blocks or refuses.
        prefill_tokens, prefill_patches: prompt tokens cached and patches encoded between two decode steps, at most, so
            that rows which decode do not wait long for those that enter. A picture cannot be split: a larger one is
            encoded between two steps alone.
        options: `decode_graphs`, `compile`, `batch_invariant`, `share_images`, `share_prefixes`, as of `generate`.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig | None = None,
        *,
        max_batch_rows: int | None = None,
        max_queue_size: int = ROWS_A_STEP,
        prefill_tokens: int = 2048,
        prefill_patches: int = 8192,
        **options: Any,
    ):
        own = {"max_queue_size": max_queue_size, "prefill_tokens": prefill_tokens, "prefill_patches": prefill_patches}
        for name, value in own.items():
            check_number(name, value, whole=True, least=1)
        self.model, self.generation_config, self.max_queue_size = model, generation_config, max_queue_size
        options |= {"max_batch_rows": max_batch_rows, "step_tokens": prefill_tokens, "step_patches": prefill_patches}
        self._options = {**options, "expected": EXPECTED_PLACES}
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # that ended the engine
        self._changed = threading.Condition()  # guards all that follows
        self._running, self._stopping, self._dropping = False, False, False
        self._requests: dict[str, Request] = {}  # that are not finished
        self._waiting = 0  # of them, without a slot
        self._calls: deque[Callable[[Any], Any]] = deque()  # that the engine's thread has yet to make
        self._results: dict[str, GenerationOutput] = {}  # that nobody has fetched; of a streaming request the latest
        self._handlers: dict[str, Handler] = {}

    def start(self) -> None:
        """Takes requests from now on; while an earlier thread is being stopped, from its end on."""
        with self._changed:
            mine = threading.current_thread() is self._thread
            self._changed.wait_for(lambda: mine or not (self._stopping and self._running))
            if not self._running:
                self._running, self._stopping, self._dropping, self._error = True, False, False, None
                self._calls = deque()
                self._thread = threading.Thread(target=self._run, name="continuous batching", daemon=True)
                self._thread.start()

    def is_running(self) -> bool:
        return self._running

    @property
    def _closed(self) -> bool:
        return self._stopping or not self._running

    def stop(self, block: bool = True, timeout: float | None = None, hard_stop: bool = False) -> None:
        """No requests are taken any more; those that are there are answered, or with `hard_stop` failed. block: until
        that is done, or for `timeout` seconds."""
        with self._changed:
            self._stopping, self._dropping = True, self._dropping or hard_stop
            self._changed.notify_all()
        if block:
            self.join(timeout)

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end of the thread, or for `timeout` seconds."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        engine = None
        try:
            with torch.no_grad():
                longest = self.model.config.text_config.max_position_embeddings
                engine = self.model.engine(longest + WINDOW, **self._options)
                while self._take(engine):
                    self._tell([self._requests[str(row.index)] for row in engine.step()] if engine.busy else [])
                    self._follow(engine)
        except Exception as error:
            logger.error(f"continuous batching ended: {type(error).__name__}: {error}", exc_info=True)
            self._error = error
        finally:
            if engine is not None:
                engine.close()
            with self._changed:
                self._stopping = True  # and from now on nobody adds
            why = self._error or RuntimeError("the manager was stopped")
            for request in self._requests.values():
                request.row.fail(f"{type(why).__name__}: {why}")
            self._tell([*self._requests.values()], last=True)

    def _take(self, engine: Any) -> bool:
        """Waits for something to do, and does what was asked for. False: there will be nothing more."""
        with self._changed:
            self._changed.wait_for(lambda: self._calls or self._stopping or engine.busy)
            if self._stopping and not (self._calls or engine.busy):
                return False
        while self._calls and not self._dropping:
            self._calls.popleft()(engine)
        return not self._dropping

    def _add(self, request: Request, engine: Any) -> None:
        try:
            engine.add(request.row)
        except Exception as error:
            request.row.fail(f"{type(error).__name__}: {error}", error)
            self._tell([request])

    def _cancel(self, request: Request, engine: Any) -> None:
        if self._requests.get(str(request.row.index)) is request:
            engine.cancel(request.row)
            self._tell([request])

    def _call_soon(self, call: Callable[[Any], Any]) -> None:
        """Has the engine's thread call `call` with the engine before its next step, in the order of asking."""
        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()

    def _follow(self, engine: Any) -> None:
        """Notes which rows have a slot, and tells of what is new in streaming ones."""
        requests = [self._requests[str(row.index)] for row in engine.active.values()]
        with self._changed:
            for request in requests:
                self._begin(request)
        self._tell([one for one in requests if one.streaming and len(one.row.answer) > one.told])

    def _begin(self, request: Request) -> None:
        if request.begun < 0:
            request.begun = time.perf_counter()
            self._waiting -= 1
            self._changed.notify_all()

    def _tell(self, requests: list[Request], last: bool = False) -> None:
        """Outputs to handlers, or to whoever fetches them. last: the engine is gone."""
        handled: list[tuple[Handler, GenerationOutput]] = []
        with self._changed:
            self._running = self._running and not last
            for request in requests:
                name = str(request.row.index)
                if request.row.finish_reason is not None:
                    self._begin(request)
                    del self._requests[name]
                output = request.output()
                handler = self._handlers.pop(name, None) if output.is_finished() else self._handlers.get(name)
                if handler is None:
                    self._results[name] = output
                else:
                    handled.append((handler, output))
            if requests or last:
                self._changed.notify_all()
        for handler, output in handled:
            _call(handler, output)

    def add_request(
        self,
        input_ids: Any,
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        *,
        block: bool = True,
        timeout: float | None = None,
        result_handler: Handler | None = None,
        generation_config: GenerationConfig | None = None,
        generator: torch.Generator | None = None,
        **row: Any,
    ) -> str:
        """Adds a request, one row of what `generate` takes, and returns its id.

        Args:
            input_ids: `[1, L]` long, or a list of ids. request_id: a name that no other request has; one is made up by
                default. streaming: whether outputs come as tokens are accepted.
            block, timeout: whether to wait while the queue is full, and for how many seconds at most.
            result_handler: as of `register_result_handler`.
            generator: draws for this request only.
            row: what else `generate` takes for a row: `attention_mask`, `pixel_values`, `image_grid_hws`,
                `visual_features`, `generation_mode`, `temperature`, `eos_token_id`, `stopping_criteria`, …

        Raises:
            ValueError: what `generate` would refuse, or an id that is taken. What goes wrong later fails the request.
            queue.Full: no place in the queue. RuntimeError: the manager does not run; with the error that ended it.
        """
        row |= {"input_ids": input_ids, "generator": None if generator is None else [generator]}
        for name in ("input_ids", "attention_mask"):
            if row.get(name) is not None:
                told = torch.as_tensor(row[name])
                row[name] = told.unsqueeze(0) if told.dim() == 1 else told
        config = generation_config or self.generation_config
        _, rows, _ = read_call(self.model, config, {**row, "max_new_tokens": max_new_tokens})
        if len(rows) != 1:
            raise ValueError(f"input_ids: a request is one row with one answer; got {len(rows)}.")
        if not isinstance(request_id, str | None):
            raise ValueError(f"request_id={request_id!r}: expected a string.")
        if not block or threading.current_thread() is self._thread:  # where nobody would make room
            timeout = 0
        with self._changed:
            self._changed.wait_for(lambda: self._waiting < self.max_queue_size or self._closed, timeout)
            if self._closed:
                raise RuntimeError("the manager does not run; call start() first.") from self._error
            if self._waiting >= self.max_queue_size:
                raise queue.Full(f"{self._waiting} requests wait for a slot (max_queue_size={self.max_queue_size}).")
            name = f"req_{next(self._numbers)}" if request_id is None else request_id
            if name in self._requests or name in self._results:
                raise ValueError(f"request_id={name!r} is taken by a request that is not answered or not fetched.")
            rows[0].index = name
            if result_handler is not None:
                self._handlers[name] = result_handler
            self._requests[name] = Request(rows[0], streaming)
            self._waiting += 1
            self._call_soon(partial(self._add, self._requests[name]))
        return name

    def cancel_request(self, request_id: str) -> None:
        """Ends a request at its next step; its output has what it has said so far. Nothing, if it is answered."""
        with self._changed:
            if request_id in self._requests:
                self._call_soon(partial(self._cancel, self._requests[request_id]))

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The output of a request, or the next one of any. Each is given once. None: not in `timeout` seconds; or the
        request is unknown, fetched already or handled; or, of any, the manager has stopped and all are fetched."""

        def ready() -> bool:
            if request_id is None:
                return bool(self._results) or not self._running
            return request_id in self._results or request_id not in self._requests

        with self._changed:
            # in a handler, nobody would bring it
            self._changed.wait_for(ready, 0 if threading.current_thread() is self._thread else timeout)
            return self._results.pop(next(iter(self._results), "") if request_id is None else request_id, None)

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Outputs as they come, until the manager has stopped: `stop(block=False)` ends it behind the last one."""
        while (output := self.get_result()) is not None:
            yield output

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """Outputs of one request. Each holds all tokens so far, so one that comes too late is left out."""
        while (output := self.get_result(request_id)) is not None:
            yield output
            if output.is_finished():
                return

    def register_result_handler(self, request_id: str, callback: Handler) -> None:
        """Calls back with outputs of a request, as they come, from the engine's thread, which waits for the call; the
        last one, if it is there already, at once. They are not to be fetched then."""
        with self._changed:
            output = self._results.pop(request_id, None)
            if request_id in self._requests:  # and what is there is not the last
                self._handlers[request_id] = callback
                return
        if output is not None:
            _call(callback, output)


def _call(handler: Handler, output: GenerationOutput) -> None:
    try:
        handler(output)
    except Exception:
        logger.exception(f"the result handler of {output.request_id} failed")


class ContinuousBatching:
    """What a model with an `engine` offers for requests that come one by one."""

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, **options: Any
    ) -> ContinuousBatchingManager:
        """A manager, to be started. options: of `ContinuousBatchingManager`."""
        return ContinuousBatchingManager(self, generation_config, **options)

    @contextmanager
    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | None = None,
        *,
        block: bool = True,
        timeout: float | None = None,
        **options: Any,
    ) -> Iterator[ContinuousBatchingManager]:
        """A manager that runs, and at the end of the block answers what is left; after an error in it, drops it."""
        manager = self.init_continuous_batching(generation_config, **options)
        manager.start()
        try:
            yield manager
        except BaseException:
            manager.stop(block, timeout, hard_stop=True)
            raise
        manager.stop(block, timeout)

    def generate_batch(
        self,
        rows: Iterable[Any],
        generation_config: GenerationConfig | None = None,
        *,
        stream: bool = False,
        progress_bar: bool = False,
        **settings: Any,
    ) -> dict[str, GenerationOutput] | Iterator[GenerationOutput]:
        """Answers rows of any number, taken from an iterable as places get free, in a thread of its own.

        Args:
            rows: each the processor's output of one conversation, a dict, with what else `add_request` takes for it
                (`request_id` is by default "row_0", "row_1", …); or a list of ids. A row that cannot be answered gives
                an output with an error, and others go on.
            stream: give an iterator of outputs as rows finish, which holds few rows at a time, instead of all.
            settings: of `add_request`, for all rows, and of `ContinuousBatchingManager`.

        Returns:
            {request_id: output}, in the order of the rows, or the iterator.

        Raises:
            ValueError: two rows of one id. Exception: what the iterable raised, or what ended the engine, an error of
                the device say; answers before it are given only where they are streamed.
        """
        names: dict[str, None] = {}

        def named() -> Iterator[dict[str, Any]]:
            for number, row in enumerate(rows):
                own = {**row} if isinstance(row, Mapping) else {"input_ids": row}
                own["request_id"] = own.get("request_id") or f"row_{number}"
                if not stream:
                    if own["request_id"] in names:
                        raise ValueError(f"request_id: two rows are named {own['request_id']!r}.")
                    names[own["request_id"]] = None
                yield own

        options = {name: settings.pop(name) for name in _OPTIONS & settings.keys()}
        outputs = _answers(self.init_continuous_batching(generation_config, **options), named(), settings)
        if progress_bar:
            outputs = logging.tqdm(outputs, total=len(rows) if isinstance(rows, Sized) else None, unit="row")
        if stream:
            return iter(outputs)
        told = {output.request_id: output for output in outputs if output.is_finished()}
        return {name: told[name] for name in names}


def _answers(
    manager: ContinuousBatchingManager, rows: Iterator[dict[str, Any]], settings: dict[str, Any]
) -> Iterator[GenerationOutput]:
    """Outputs of rows as they finish. Rows are taken no faster than their answers are."""
    said: queue.SimpleQueue[GenerationOutput | BaseException | None] = queue.SimpleQueue()
    places = threading.Semaphore(4 * manager.max_queue_size)  # rows taken whose answers are not

    def feed() -> None:
        end = None
        try:
            for row in rows:
                places.acquire()
                try:
                    manager.add_request(**{**settings, **row}, result_handler=said.put)
                except Exception as error:
                    if manager._closed:
                        raise
                    said.put(GenerationOutput.refused(row["request_id"], error))
        except BaseException as error:
            end = error
        manager.stop()  # what was added is answered first
        said.put(manager._error or end)

    manager.start()
    feeder = threading.Thread(target=feed, name="rows", daemon=True)
    feeder.start()
    try:
        while (output := said.get()) is not None:
            if isinstance(output, BaseException):
                raise output
            yield output
            if output.is_finished():
                places.release()
    finally:
        manager.stop(hard_stop=True)
        places.release()  # for the thread to see it
        feeder.join(1)  # one that frees tensors while the interpreter ends aborts the process
