# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""A model with its engine in a process of its own, so that no other Python holds up its steps.

One thread of an interpreter runs at a time: what decodes pictures, answers HTTP or writes records beside the engine
takes its time. Requests go to the process by its standard input and outputs come by its standard output, pickled.
"""

import atexit
import gc
import io
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

if __name__ == "__main__":  # the process itself
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all; who started it acts on them
        signal.signal(number, signal.SIG_IGN)
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import torch

from hub.loading import ModelError, load, load_class, load_processor

ROWS = 32  # that an engine decodes at a time, unless it is told
_CRITERION = object()  # stands for the model's `degenerate_answer_criteria`
PIPE_BYTES = 2**20  # where the system lets it; by 64 KiB, both sides wait for each other all the time


def load_apart(model: str, **loading: Any) -> tuple["EngineProcess", Any]:
    """`hub.loading.load`, but the model is loaded in a process of its own, which stands for it.

    Raises:
        ModelError: as there.
    """
    engine = EngineProcess(model, loading)
    try:
        engine.processor, engine.code = load_processor(model), load_class(model)  # while the process loads the model
        engine.wait()
    except BaseException:
        engine.close()
        raise
    return engine, engine.processor


class EngineProcess:
    """Stands for a model where its `generate_batch` or its manager is asked for, once: the process ends with it.

    It is the manager itself: `add_request`, which wants a handler, `cancel_request`, `is_running`, `start` and `stop`
    are those of `ContinuousBatchingManager`, but what a request is refused for comes as its output's error.
    """

    device = torch.device("cpu")  # of tensors and generators that it is given
    command = (sys.executable, __file__)
    processor: Any = None  # which requests may refer to
    code: Any = None  # the model's class
    max_queue_size = ROWS

    def __init__(self, model: str, loading: dict[str, Any]):
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pipesize=PIPE_BYTES
        )
        atexit.register(self._process.kill)
        self._changed = threading.Condition()  # guards what follows
        self._open: dict[str, tuple[Any, Callable[[Any], Any]]] = {}  # prompts and handlers of unfinished requests
        self._running = self._stopping = False
        self._error: Exception | None = None  # that ended the engine
        self._names = map("req_{}".format, range(2**63))
        self._sending = threading.Lock()
        self._sent: list[torch.Tensor] = []  # with the last message
        self._listener = threading.Thread(target=self._listen, name="outputs", daemon=True)
        self._send(model, loading)

    def wait(self) -> None:
        """Until the model is loaded."""
        if (told := self._receive()) is not None:
            raise ModelError(told)

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        with self._sending, suppress(OSError), self._process:  # which closes its pipes and waits
            atexit.unregister(self._process.kill)

    # ---- as the model

    def degenerate_answer_criteria(self) -> Any:
        return _CRITERION

    def init_continuous_batching(self, generation_config: Any = None, **options: Any) -> "EngineProcess":
        self.max_queue_size = options.pop("max_queue_size", ROWS)
        self._most = self.max_queue_size + (options.get("max_batch_rows") or ROWS)  # requests that are not finished
        options |= {"generation_config": generation_config, "max_queue_size": self._most}
        self._send("init_continuous_batching", options)
        return self

    def generate_batch(self, rows: Iterable[Any], *given: Any, **settings: Any) -> Any:
        return self.code.generate_batch(self, rows, *given, **settings)

    # ---- as its manager

    def start(self) -> None:
        self._running = True
        self._listener.start()

    def is_running(self) -> bool:
        return self._running

    @property
    def _closed(self) -> bool:
        return self._stopping or not self._running

    def add_request(
        self,
        input_ids: Any,
        request_id: str | None = None,
        *,
        result_handler: Callable[[Any], Any],
        block: bool = True,
        timeout: float | None = None,
        **row: Any,
    ) -> str:
        with self._changed:
            self._changed.wait_for(lambda: len(self._open) < self._most or self._closed, timeout if block else 0)
            if self._closed:
                raise RuntimeError("the engine does not run.") from self._error
            if len(self._open) >= self._most:
                raise queue.Full(f"{len(self._open)} requests are not answered.")
            name = next(self._names) if request_id is None else request_id
            self._open[name] = input_ids, result_handler
        try:
            self._send("add_request", {"input_ids": input_ids, "request_id": name, **row}, name)
        except Exception:  # what cannot be pickled
            with self._changed:
                self._open.pop(name, None)
            raise
        return name

    def cancel_request(self, request_id: str) -> None:
        self._send("cancel_request", {"request_id": request_id})

    def stop(self, block: bool = True, timeout: float | None = None, hard_stop: bool = False) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._send("stop", {"block": False, "hard_stop": hard_stop})
        if block:
            self._listener.join(timeout)

    def _send(self, what: Any, said: Any, name: str | None = None) -> None:
        """said: pickled apart, so that what the process cannot read ends only the request of that name."""
        assert self._process.stdin is not None
        data = io.BytesIO()
        with self._sending:
            pickler = _Pickler(data, pickle.HIGHEST_PROTOCOL)
            pickler.processor, pickler.before = self.processor, self._sent
            pickler.dump(said)
            self._sent = pickler.tensors
            with suppress(OSError, ValueError):  # that it has ended is told by who listens
                pickle.dump((what, name, data.getvalue()), self._process.stdin, pickle.HIGHEST_PROTOCOL)
                self._process.stdin.flush()

    def _receive(self) -> Any:
        """What the process says next, or a text: why it says nothing more."""
        assert self._process.stdout is not None
        with suppress(EOFError):
            return pickle.load(self._process.stdout)
        return f"the process of the model ended with {self._process.wait()}"

    def _listen(self) -> None:
        outputs = _outputs(self.code)
        while not isinstance(told := self._receive(), str | None):
            fields, running = told
            output = outputs(**fields)
            with self._changed:
                self._running = running
                _, handler = self._open[output.request_id]
                if output.is_finished():
                    del self._open[output.request_id]
                    self._changed.notify_all()
            handler(output)
        self._process.wait()
        self.close()
        with self._changed:
            self._running = False
            self._error = None if told is None else RuntimeError(told)
            left, self._open = self._open, {}
            self._changed.notify_all()
        for name, (prompt, handler) in left.items():
            output = outputs.refused(name, self._error or RuntimeError("the engine was stopped"))
            output.prompt_ids = prompt  # it was not refused
            handler(output)


def _outputs(code: Any) -> Any:
    """The class of a model's outputs, by the model's."""
    return sys.modules[code.init_continuous_batching.__module__].GenerationOutput


class _Pickler(pickle.Pickler):
    """Tensors go as arrays, and one that the last message had already, as rows share pictures, by its place there;
    generators as their seeds; the processor and the criterion as the ones that are there."""

    processor: Any
    before: list[torch.Tensor]

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            known = [place for place, tensor in enumerate(self.before) if tensor is value]
            return ("again", known[0]) if known else ("tensor", value.numpy())
        if isinstance(value, torch.Generator):
            return "generator", value.initial_seed()
        if value is _CRITERION:
            return "criterion", None
        return ("processor", None) if value is self.processor is not None else None


class _Unpickler(pickle.Unpickler):
    model: Any = None
    processor: Any = None
    before: list[torch.Tensor] = []

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.tensors: list[torch.Tensor] = []

    def persistent_load(self, told: Any) -> Any:
        kind, value = told
        if kind == "generator":
            return torch.Generator(self.model.device).manual_seed(value)
        if kind == "criterion":
            return self.model.degenerate_answer_criteria()
        if kind == "processor":
            return self.processor
        self.tensors.append(self.before[value] if kind == "again" else torch.from_numpy(value))
        return self.tensors[-1]


def main(load: Callable[..., tuple[Any, Any]] = load) -> None:
    """The process: loads a model, and runs its engine until it is stopped, fails, or nobody is there any more."""
    line, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed here is not for who reads
    telling = threading.Lock()

    def tell(told: Any) -> None:
        with telling:
            try:
                pickle.dump(told, out, pickle.HIGHEST_PROTOCOL)
                out.flush()
            except BrokenPipeError:  # nobody is there any more
                os._exit(0)

    def read(data: bytes) -> Any:
        unpickler = _Unpickler(io.BytesIO(data))
        unpickler.model, unpickler.processor, unpickler.before = model, processor, seen[:]
        try:
            return unpickler.load()
        finally:
            seen[:] = unpickler.tensors

    def post(output: Any) -> None:
        fields = {**vars(output), "status": int(output.status)}  # no class: its code may lie elsewhere there
        if not output.is_finished():
            fields["prompt_ids"] = []  # known where it came from
        tell((fields, manager.is_running()))

    def obey() -> None:
        with suppress(EOFError):
            while True:
                what, name, data = pickle.load(line)
                if name is None:
                    getattr(manager, what)(**read(data))
                    continue
                try:
                    manager.add_request(**read(data), result_handler=post)
                except Exception as error:
                    post(_outputs(model).refused(name, error))
        os._exit(0)

    model = processor = None
    seen: list[torch.Tensor] = []
    folder, _, data = pickle.load(line)
    try:
        model, processor = load(folder, **read(data))
    except ModelError as error:
        tell(str(error))
        return
    gc.freeze()  # a collection that went through all of torch would hold a step up by 0.2 s
    tell(None)
    with suppress(EOFError):
        _, _, data = pickle.load(line)
        manager = model.init_continuous_batching(**read(data))
        manager.start()
        threading.Thread(target=obey, daemon=True).start()
        manager.join()
        tell(None if manager._error is None else str(manager._error))
    os._exit(0)  # without the interpreter's end, which would wait for who reads


if __name__ == "__main__":
    main()
