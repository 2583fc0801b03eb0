"""A stand-in for an accelerator: tensors that say they lie on one and compute on the CPU.

Inside `PretendDevice`, a dispatch mode, every operation on them is seen. Copies between host and device and operations
that make the host wait are noted with the lines of the project that caused them; what CUDA would refuse raises. A
capture records operations, and its replay does them again on the same memory, as a CUDA graph does: whatever Python
decided at the capture stays as it was. Device type "lazy" is one that torch's CPU wheel has and nobody uses.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakKeyDictionary

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import locateanything.cuda_graphs as cuda_graphs

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("lazy:0")
CPU = torch.device("cpu")
aten = torch.ops.aten

TO_DEVICE, TO_HOST, WAITS = "to device", "to host", "waits"

# The host waits for their result, or for the size of it
WAITING = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.multinomial.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# They launch no kernel, as views do not
NO_KERNEL = {
    aten.detach.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.lift_fresh.default,
    aten.new_empty.default,
    aten._reshape_alias.default,
    aten._unsafe_view.default,
}


class Event(NamedTuple):
    """What goes between host and device. place: the lines of the project that led to it, the innermost first."""

    kind: str
    operation: str
    place: str


class Operation(NamedTuple):
    """A kernel: its name, and of each tensor that goes in its shape, strides and dtype."""

    name: str
    tensors: tuple[tuple, ...]


class OnDevice(torch.Tensor):
    """A tensor that says it lies on the device; `held` is where its numbers are."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} on a tensor of the pretended device, outside of its mode")

    def __repr__(self):
        return f"OnDevice({self.held!r})"

    def __setitem__(self, index, value):
        # CUDA copies the number from the host, but into a stretch, which it fills; this type of device never copies
        if not isinstance(value, torch.Tensor) and (tensors_of(index) or not self.held[index].dim()):
            PretendDevice.current.note(TO_DEVICE, "a number written")
        super().__setitem__(index, value)

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.cpu().tolist()


class Generator(torch.Generator):
    """One of the device, that draws as the host's."""

    device = DEVICE


def mapped(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """`value` with its tensors replaced; as torch's pytree, which takes most of the time here."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, each) for each in value])
    if isinstance(value, dict):
        return {name: mapped(function, each) for name, each in value.items()}
    return value


def tensors_of(*values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    mapped(found.append, values)
    return found


def held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, OnDevice) else tensor


def described(tensors: list[torch.Tensor]) -> tuple[tuple, ...]:
    return tuple((each.shape, each.stride(), each.dtype) for each in tensors)


def launches(function: Any) -> bool:
    """Whether it is a kernel; a view is none."""
    return not getattr(function, "is_view", False) and function not in NO_KERNEL


def place() -> str:
    """The lines of the project that lead here, the innermost first."""
    frames = (frame for frame in reversed(traceback.extract_stack()) if Path(frame.filename).parent == ROOT)
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in list(frames)[:3])


@torch.no_grad()
def replayed(tape: list[tuple]) -> None:
    """Does recorded operations again; their results go where the first ones are."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        for function, args, kwargs, before in tape:
            now = function(*args, **kwargs)
            for old, new in zip(tensors_of(before), tensors_of(now), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tape(TorchDispatchMode):
    """A capture without a device: `replayed(tape.operations)` does on the CPU what was done inside."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if launches(function):
            self.operations.append((function, args, kwargs or {}, result))
        return result


class Fused(TorchFunctionMode):
    """Functions that are one kernel on CUDA, and a handful on a device that torch does not know."""

    FUNCTIONS = (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.rms_norm, torch.rms_norm)

    def __init__(self, device: PretendDevice):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in self.FUNCTIONS or not isinstance(args[0], OnDevice):
            return function(*args, **kwargs)
        tensors = tensors_of(args, kwargs)
        assert all(isinstance(each, OnDevice) for each in tensors), "tensors of two devices"
        with _disable_current_modes():
            return self.device.do(function, tensors, args, kwargs)


class PretendDevice(TorchDispatchMode):
    """While it is entered, device "lazy" works. It does not nest.

    Attributes:
        events: what went between host and device. violations: those of a capture, which they would have ended.
        operations: the kernels, one by one. A replay is none of them.
        tape: the operations of the capture that is going on, or None.
    """

    current: PretendDevice

    def __init__(self):
        super().__init__()
        self.fused, self.exits = Fused(self), contextlib.ExitStack()
        self.events: list[Event] = []
        self.violations: list[Event] = []
        self.operations: list[Operation] = []
        self.tape: list[tuple] | None = None

    def __enter__(self):
        PretendDevice.current = self
        # torch.tensor(…, device=…) then makes a tensor on the host and copies it, which is seen
        self.exits.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self.exits.enter_context(self.fused)
        autocast = torch.autocast
        self.exits.enter_context(
            mock.patch.object(
                torch,
                "autocast",
                lambda device_type, *args, **kwargs: (
                    contextlib.nullcontext() if device_type == DEVICE.type else autocast(device_type, *args, **kwargs)
                ),
            )
        )
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.exits.close()

    def note(self, kind: str, operation: str) -> None:
        event = Event(kind, operation, place())
        self.events.append(event)
        if self.tape is not None:
            self.violations.append(event)

    # ---- operations

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = tensors_of(args, kwargs)
        here = [isinstance(tensor, OnDevice) for tensor in tensors]
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        if device is not None:
            kwargs["device"] = CPU
        if function is aten._to_copy.default:
            if here[0] and target == "cpu":
                self.note(TO_HOST, str(function))
                return function(args[0].held, **kwargs)
            if not here[0] and target == DEVICE.type:
                self.note(TO_DEVICE, str(function))
        elif function is aten.copy_.default:
            if here[0] != here[1]:
                self.note(TO_DEVICE if here[0] else TO_HOST, str(function))
            if not here[0]:
                return function(args[0], held(args[1]), *args[2:])
        elif any(here) and not all(here):
            self.check_mixed(function, tensors)
        if any(here) and function in WAITING:
            self.note(WAITS, str(function))
        indices = tensors_of(args[1]) if function in INDEXING else []
        if any(isinstance(each, OnDevice) and each.dtype == torch.bool for each in indices):
            self.note(WAITS, f"{function} by a bool mask")
        if function is aten.is_pinned.default:
            return False
        if not any(here) and target != DEVICE.type:
            return function(*args, **kwargs)
        return self.do(function, tensors, args, kwargs)

    def check_mixed(self, function: Any, tensors: list[torch.Tensor]) -> None:
        """Tensors of host and device in one operation: what CUDA takes of it, and what it costs."""
        others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        if function in INDEXING:
            self.note(TO_DEVICE, f"{function} by a tensor of the host")
        elif any(tensor.dim() for tensor in others):
            raise RuntimeError(f"{function} got tensors of two devices: {described(tensors)} at {place()}")

    def do(self, function: Callable, tensors: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        """The operation itself; what comes out lies on the device."""
        args, kwargs = mapped(held, args), mapped(held, kwargs)
        result = function(*args, **kwargs)
        if launches(function):
            self.operations.append(Operation(getattr(function, "__name__", str(function)), described(tensors)))
            if self.tape is not None:
                self.tape.append((function, args, kwargs, result))
        if function is aten._local_scalar_dense.default:
            return result
        known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnDevice)}
        return mapped(lambda x: known[id(x)] if id(x) in known else OnDevice(x), result)

    # ---- what torch.cuda.CUDAGraph does

    def capture(self, compute: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Returns what replays it, and what it gave."""
        assert self.tape is None, "one capture at a time"
        self.tape = tape = []
        try:
            result = compute()
        finally:
            self.tape = None

        return functools.partial(replayed, tape), result

    # ---- moving

    def put_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """A copy of the model that says it lies on the device; the numbers are those of the model itself."""
        weights = [*model.parameters(), *model.buffers()]
        moved = copy.deepcopy(model, {id(weight): weight for weight in weights})
        there = {id(weight): OnDevice(weight.detach()) for weight in weights}
        for module in moved.modules():
            for held_by in (module._parameters, module._buffers):
                held_by.update({name: there[id(one)] for name, one in held_by.items() if one is not None})
        return moved


def capture_by(capture: Callable[..., Any], patch: pytest.MonkeyPatch, uses: int) -> None:
    """Steps are captured so, here too, and when a shape has so many uses; nothing is kept from before."""
    patch.setattr(cuda_graphs, "capture_graph", capture)
    patch.setattr(cuda_graphs, "capturable", lambda model, device: True)
    patch.setattr(cuda_graphs, "WORTH_CAPTURING", uses)
    patch.setattr(cuda_graphs, "WORTH_PACKING", 30)  # of few rows too
    patch.setattr(cuda_graphs, "_kept", WeakKeyDictionary())
