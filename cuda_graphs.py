# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the decode step: one launch for what are a thousand, captured at first use of a shape.

A step reads its state and the cache from buffers that stay where they are, so a graph needs no inputs. A step runs in
the smallest of few shapes that holds it; the other slots have nothing to do.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from .configuration import WINDOW
from .kv_cache import KEY_BLOCK, round_up

logger = logging.get_logger(__name__)

ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
WARM_UP_STEPS = 2  # libraries choose and set up their kernels outside the capture

Shape = tuple[int, int, bool, int]


def bucket(rows: int, pending: int, windows: bool, longest: int, *, slots: int, capacity: int) -> Shape:
    """The shape to run a step in, each number at least what was asked; `longest` grows by at most a quarter."""
    sizes = [size for size in ROW_BUCKETS if size < slots] + [slots]
    longest = min(round_up(longest, max(KEY_BLOCK, 1 << max(0, longest.bit_length() - 3))), capacity)
    return sizes[bisect_left(sizes, rows)], 1 if pending == 1 and not windows else WINDOW, windows, longest


class DecodeGraphs:
    """Runs a step's computation from graphs; where capture fails, as it is, from then on.

    Args:
        compute: `(rows, pending, windows, longest) -> hidden states [rows, width, hidden]`, reading and writing
            persistent buffers of `device` only.
        slots, capacity: of the cache; no bucket is larger.
    """

    def __init__(self, compute: Callable[..., torch.Tensor], *, slots: int, capacity: int):
        self.compute, self.slots, self.capacity = compute, slots, capacity
        self.graphs: dict[Shape, tuple[Callable[[], None], torch.Tensor]] = {}
        self.pool: Any = None
        self.works = True

    def __call__(self, rows: int, pending: int, windows: bool, longest: int) -> torch.Tensor:
        """Hidden states `[rows, width, hidden]` of the first `rows` rows, in a grid as wide as the bucket's."""
        shape = bucket(rows, pending, windows, longest, slots=self.slots, capacity=self.capacity)
        if self.works and shape not in self.graphs:
            try:
                self.graphs[shape] = capture_graph(self, shape)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.warning_once(f"the decode step cannot be captured as a CUDA graph, and runs as it is: {error}")
                self.works, self.graphs = False, {}
        if not self.works:
            return self.compute(rows, pending, windows, longest)
        replay, hidden = self.graphs[shape]
        replay()
        return hidden[:rows]


def capture_graph(graphs: DecodeGraphs, shape: Shape) -> tuple[Callable[[], None], torch.Tensor]:
    """Captures one shape; all graphs share a pool, for only one runs at a time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            graphs.compute(*shape)  # writes what the replay will write, so it may run any number of times
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # other threads' work is theirs, and must not end the capture
    with torch.cuda.graph(graph, pool=graphs.pool, capture_error_mode="thread_local"):
        hidden = graphs.compute(*shape)
    graphs.pool = graph.pool()
    return graph.replay, hidden
