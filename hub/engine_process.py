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
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

if __name__ == "__main__":  # the process itself
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all; who started it acts on them
        signal.signal(number, signal.SIG_IGN)
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import torch

from hub.loading import ModelError, load, load_class, load_processor

ROWS = 32  # that an engine decodes at a time, unless it is told
_CRITERION = object()  # stands for the model's `degenerate_answer_criteria`
PIPE_BYTES = 2**20  # where the system lets it: a picture crosses in fewer turns than by 64 KiB


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
        self._process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with suppress(ImportError, AttributeError, OSError):  # Linux, if not too many have such pipes already
            import fcntl

            for pipe in filter(None, (self._process.stdin, self._process.stdout)):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        atexit.register(self._process.kill)
        self._changed = threading.Condition()  # guards what follows
        self._open: dict[str, tuple[Any, Callable[[Any], Any]]] = {}  # prompts and handlers of unfinished requests
        self._running = self._stopping = False
        self._error: Exception | None = None  # that ended the engine
        self._names = map("req_{}".format, range(2**63))
        # messages, which a thread sends: a process that does not read must not hold up who asks
        self._outbox: queue.SimpleQueue[tuple[Any, Any, str | None] | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send_all, name="requests", daemon=True)
        self._sender.start()
        self._listener = threading.Thread(target=self._listen, name="outputs", daemon=True)
        self._outbox.put((model, loading, None))

    def wait(self) -> None:
        """Until the model is loaded."""
        if (told := self._receive()) is not None:
            raise ModelError(told)

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        atexit.unregister(self._process.kill)
        self._outbox.put(None)
        self._sender.join()
        with suppress(OSError), self._process:  # which closes its pipes and waits
            pass

    # ---- as the model

    def degenerate_answer_criteria(self) -> Any:
        return _CRITERION

    def init_continuous_batching(self, generation_config: Any = None, **options: Any) -> "EngineProcess":
        self.max_queue_size = options.pop("max_queue_size", ROWS)
        self._most = self.max_queue_size + (options.get("max_batch_rows") or ROWS)  # requests that are not finished
        options |= {"generation_config": generation_config, "max_queue_size": self._most}
        self._outbox.put(("init_continuous_batching", options, None))
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
                why = "" if self._error is None else f": {self._error}"
                raise RuntimeError(f"the engine does not run{why}.")
            if len(self._open) >= self._most:
                raise queue.Full(f"{len(self._open)} requests are not answered.")
            name = next(self._names) if request_id is None else request_id
            if name in self._open:
                raise ValueError(f"request_id={name!r} is taken by a request that is not answered.")
            self._open[name] = input_ids, result_handler
        self._outbox.put(("add_request", {"input_ids": input_ids, "request_id": name, **row}, name))
        return name

    def cancel_request(self, request_id: str) -> None:
        self._outbox.put(("cancel_request", {"request_id": request_id}, None))

    def stop(self, block: bool = True, timeout: float | None = None, hard_stop: bool = False) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._outbox.put(("stop", {"block": False, "hard_stop": hard_stop}, None))
        if block:
            self._listener.join(timeout)

    def _send_all(self) -> None:
        """Sends what is in the outbox: what is said is pickled apart, so that what cannot be, or cannot be read there,
        ends only the request of that name."""
        assert self._process.stdin is not None
        sent: list[torch.Tensor] = []  # with the last message
        while (message := self._outbox.get()) is not None:
            what, said, name = message
            data = io.BytesIO()
            pickler = _Pickler(data, pickle.HIGHEST_PROTOCOL)
            pickler.processor, pickler.before = self.processor, sent
            try:
                pickler.dump(said)
            except Exception as error:
                if name is None:
                    raise
                self._refuse(name, error)
                continue
            sent = pickler.tensors
            with suppress(OSError):  # that it has ended is told by who listens
                pickle.dump((what, name, data.getvalue()), self._process.stdin, pickle.HIGHEST_PROTOCOL)
                self._process.stdin.flush()

    def _refuse(self, name: str, error: Exception) -> None:
        with self._changed:
            _, handler = self._open.pop(name)
            self._changed.notify_all()
        handler(_outputs(self.code).refused(name, error))

    def _receive(self) -> Any:
        """What the process says next, or a text: why it says nothing more."""
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except EOFError:
            pass
        except Exception:  # half of a message
            self._process.kill()
        return f"the process of the model ended with {self._process.wait()}"

    def _listen(self) -> None:
        why: str | None = "an output could not be handled"
        try:
            while not isinstance(told := self._receive(), str | None):
                fields, running = told
                output = _outputs(self.code)(**fields)
                with self._changed:
                    self._running = running
                    _, handler = self._open[output.request_id]
                    if output.is_finished():
                        del self._open[output.request_id]
                        self._changed.notify_all()
                handler(output)
            self._process.wait()
            why = told
        finally:
            self._end(why)

    def _end(self, why: str | None) -> None:
        """The process has ended, or is to: for the error `why`, or as it was told to."""
        self.close()
        with self._changed:
            self._running = False
            self._error = None if why is None else RuntimeError(why)
            left, self._open = self._open, {}
            self._changed.notify_all()
        for name, (prompt, handler) in left.items():
            output = _outputs(self.code).refused(name, self._error or RuntimeError("the engine was stopped"))
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
            return "known", "criterion"
        return ("known", "processor") if value is self.processor is not None else None


class _Unpickler(pickle.Unpickler):
    known: dict[str, Any]
    before: list[torch.Tensor] = []

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.tensors: list[torch.Tensor] = []

    def persistent_load(self, told: Any) -> Any:
        kind, value = told
        if kind == "generator":
            return torch.Generator(self.known["device"]).manual_seed(value)
        if kind == "known":
            return self.known[value]
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
        unpickler.known, unpickler.before = known, seen[:]
        try:
            return unpickler.load()
        finally:
            seen[:] = unpickler.tensors

    def post(output: Any) -> None:
        fields = {**vars(output), "status": int(output.status)}  # no class: its code may lie elsewhere there
        if not output.is_finished():
            fields["prompt_ids"] = []  # known where it came from
        tell((fields, manager.is_running()))

    def obey(what: str, name: str | None, data: bytes, _: Any) -> None:
        if name is None:
            getattr(manager, what)(**read(data))
            return
        try:
            manager.add_request(**read(data), result_handler=post)
        except Exception as error:
            post(_outputs(model).refused(name, error))

    def hear() -> None:
        try:
            # on CPUs each of a step's operations would give the interpreter away; while a GPU works it is free
            take = manager._call_soon if known["device"].type == "cpu" else (lambda call: call(None))
            while True:
                take(partial(obey, *pickle.load(line)))
        finally:  # who started it has gone, perhaps in the middle of a message
            os._exit(0)

    def watch() -> None:
        """Ends the process when nobody reads any more, while it loads too."""
        poll = select.poll()
        poll.register(out, 0)
        poll.poll()
        os._exit(0)

    if hasattr(select, "poll"):  # not on Windows
        threading.Thread(target=watch, daemon=True).start()
    known: dict[str, Any] = {}
    seen: list[torch.Tensor] = []
    try:
        folder, _, data = pickle.load(line)
        model, processor = load(folder, **read(data))
        known.update(device=model.device, processor=processor, criterion=model.degenerate_answer_criteria())
        gc.freeze()  # a collection that went through all of torch would hold a step up by 0.2 s
        tell(None)
        _, _, data = pickle.load(line)
        manager = model.init_continuous_batching(**read(data))
        manager.start()
        threading.Thread(target=hear, daemon=True).start()
        manager.join()
        tell(None if manager._error is None else told_of(manager._error))
    except (EOFError, pickle.UnpicklingError):  # as in `hear`
        pass
    except Exception as error:
        tell(told_of(error))
    os._exit(0)  # without the interpreter's end, which would wait for who reads


def told_of(error: Exception) -> str:
    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
