# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the decode step: one launch for what are a thousand, captured once a shape has come often enough.

A step reads its state and the cache from buffers that stay where they are, so a graph needs no inputs. A step runs in
the smallest of few shapes that holds it; the other slots have nothing to do. Graphs are kept between calls, and with
them what they hold the addresses of.
"""

import functools
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import logging

from .configuration import WINDOW
from .kv_cache import KEY_BLOCK, SlotKVCache, round_up

logger = logging.get_logger(__name__)

ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
WORTH_CAPTURING = 9  # a capture costs about what so many steps without a graph cost more
WORTH_PACKING = 256  # cells: up to here, products take as long as reading the weights does
WARM_UP_STEPS = 2  # libraries choose and set up their kernels outside the capture


class Shape(NamedTuple):
    """rows: in slots 0 … rows - 1. pending, windows, longest, cells: see `DecodeStep`. decides: whether the rules are
    part of the step."""

    rows: int
    pending: int
    windows: bool
    longest: int
    cells: int
    decides: bool

    @property
    def grid(self) -> int:
        return self.rows * (self.pending + WINDOW * self.windows)


_capturing = threading.Lock()  # one at a time in the process: they share a stream, and torch's allocator


def bucket(shape: Shape, *, slots: int, capacity: int) -> Shape:
    """The shape to run a step in, each number at least what was asked; `longest` grows by at most a quarter."""
    sizes = [size for size in ROW_BUCKETS if size < slots] + [slots]
    longest = min(round_up(shape.longest, max(KEY_BLOCK, 1 << max(0, shape.longest.bit_length() - 3))), capacity)
    pending = 1 if shape.pending == 1 and not shape.windows else WINDOW
    wider = shape._replace(rows=sizes[bisect_left(sizes, shape.rows)], pending=pending, longest=longest)
    parts = [wider.grid // 2, wider.grid * 3 // 4] if wider.grid > WORTH_PACKING else []
    return wider._replace(cells=next((part for part in parts if part >= shape.cells), wider.grid))


def capturable(model: Any, device: torch.device) -> bool:
    """Whether steps can be captured: on CUDA, and without hooks (accelerate's too), which a replay would not call."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook")
    return device.type == "cuda" and not any(getattr(each, hook, None) for each in model.modules() for hook in hooks)


def basis_of(model: Any) -> tuple:
    """What a capture takes for granted: where the weights lie, and what chooses the operations on them."""
    weights = [(each.dtype, each.shape, _address(each)) for each in (*model.parameters(), *model.buffers())]
    adapters = [  # peft's layers
        (each.disable_adapters, *each.active_adapters, *each.merged_adapters, *each.scaling.items())
        for each in model.modules()
        if hasattr(each, "merged_adapters")
    ]
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    decoder = model.get_decoder()
    chosen = decoder.config._attn_implementation, decoder.layers[0]._compiled_call_impl is None, model.training
    inference = torch.is_inference_mode_enabled()  # its buffers cannot be written outside
    return weights, adapters, autocast, chosen, inference, torch.get_float32_matmul_precision()


def _address(tensor: torch.Tensor) -> Any:
    if is_traceable_wrapper_subclass(tensor):  # a quantised weight is several tensors
        return [_address(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    return tensor.data_ptr()


class Buffers(NamedTuple):
    """What steps read and write besides weights: the cache, and of each slot its row's tokens and `State`."""

    cache: SlotKVCache
    tokens: torch.Tensor
    state: torch.Tensor


class DecodeGraphs:
    """Runs a step's computation from graphs; where capture fails, as it is, from then on.

    Args:
        basis: `basis_of` the model that computes.

    Attributes:
        buffers: graphs hold their addresses. Of them, only the cache may move.
    """

    def __init__(self, basis: tuple = ()):
        self.basis, self.works = basis, True
        self.uses: Counter[Shape] = Counter()
        self.place(None)

    def place(self, buffers: Buffers | None) -> None:
        """Goes on with these buffers, and no graphs."""
        self.buffers: Any = buffers
        self.version = buffers.cache.version if buffers else 0
        self.graphs: dict[Shape, tuple[Callable[[], None], torch.Tensor]] = {}
        self.pool: Any = None  # of memory; all graphs share one, for only one runs at a time

    def run(self, compute: Callable[..., torch.Tensor], shape: Shape) -> torch.Tensor:
        """What `compute` gives, of the first rows.

        Args:
            compute: `(shape) -> [rows, …]`, on the current CUDA device, reading and writing weights and buffers only.
        """
        cache = self.buffers.cache
        if cache.version != self.version:
            self.place(self.buffers)
        wider = bucket(shape, slots=min(cache.slots, len(self.buffers.state)), capacity=cache.places - 1)
        self.uses[wider] += 1
        if self.works and wider not in self.graphs and self.uses[wider] >= WORTH_CAPTURING:
            try:
                self.graphs[wider] = capture_graph(self, compute, wider)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.warning_once(f"the decode step cannot be captured as a CUDA graph, and runs as it is: {error}")
                self.works, self.graphs = False, {}
        if wider not in self.graphs:
            return compute(shape)
        replay, result = self.graphs[wider]
        replay()
        return result[: shape.rows]


def capture_graph(
    graphs: DecodeGraphs, compute: Callable[..., torch.Tensor], shape: Shape
) -> tuple[Callable[[], None], torch.Tensor]:
    """Captures one shape on the current device."""
    main, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads' work is theirs, and must not end the capture
    capture = torch.cuda.graph(graph, pool=graphs.pool, stream=side, capture_error_mode="thread_local")
    with _capturing:
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_STEPS):
                compute(shape)  # writes what the replay will write, so it may run any number of times
        with torch.cuda.stream(main), capture:  # back on it after a failure too
            result = compute(shape)
        main.wait_stream(side)
    graphs.pool = graph.pool()
    return graph.replay, result


@functools.cache
def _side_stream(device: int) -> Any:
    """Where a device's captures happen. Kept: libraries keep a workspace for every stream they have met."""
    return torch.cuda.Stream(device)


# ---- between calls

_kept: WeakKeyDictionary[Any, DecodeGraphs] = WeakKeyDictionary()


def take(model: Any, device: torch.device) -> DecodeGraphs | None:
    """The graphs of the last call, if they are still right and nobody else has them; or new ones. None where steps
    cannot be captured."""
    if not capturable(model, device):
        return None
    graphs, basis = _kept.pop(model, None), basis_of(model)
    return graphs if graphs is not None and graphs.basis == basis else DecodeGraphs(basis)


def keep(model: Any, graphs: DecodeGraphs) -> None:
    """For the next call. Where nothing is captured, or copies of weights that go with autocast's context, it is only
    how often shapes came."""
    if not graphs.graphs or (torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled()):
        graphs.place(None)
    _kept[model] = graphs


def kept_bytes(model: Any) -> int:
    """Of the cache that waits for the next call."""
    buffers = getattr(_kept.get(model), "buffers", None)
    return sum(layer.nbytes for layer in buffers.cache.layers.values()) if buffers else 0


def release(model: Any = None) -> None:
    """Gives memory back that is kept for the next call, of a model or of all."""
    if model is None:
        _kept.clear()
    else:
        _kept.pop(model, None)
    torch.cuda.empty_cache()  # nothing, where CUDA was never used
