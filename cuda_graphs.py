# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""CUDA graphs of the decode step: one launch for what are a thousand, captured at first use of a shape.

A step reads its state (tokens, lengths, modes) and the cache from buffers that stay where they are, so a graph needs
no inputs: shapes alone choose it. Few shapes are captured; a step runs in the smallest that holds it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from .configuration import WINDOW
from .kv_cache import KEY_BLOCK

logger = logging.get_logger(__name__)

ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
WARM_UP_STEPS = 2  # libraries choose and set up their kernels outside the capture

Shape = tuple[int, int, bool, bool, int]


def bucket(
    rows: int, pending: int, windows: bool, all_lines: bool, longest: int, *, slots: int, capacity: int
) -> Shape:
    """The shape to run a step in: (rows, pending, windows, all_lines, longest), each at least what was asked.

    Key lengths grow by at most a quarter, in multiples of `KEY_BLOCK`.
    """
    sizes = [size for size in ROW_BUCKETS if size < slots] + [slots]
    unit = max(KEY_BLOCK, 1 << max(0, longest.bit_length() - 3))
    longest = min(-(-longest // unit) * unit, capacity)
    pending = 1 if pending == 1 and not windows else WINDOW
    return sizes[bisect_left(sizes, rows)], pending, windows, all_lines, longest


class DecodeGraphs:
    """Runs a step's computation from graphs; where capture fails, as it is, from then on.

    Args:
        compute: `(rows, pending, windows, all_lines, longest) -> logits [lines, V]`, reading and writing persistent
            buffers only.
        slots, capacity: of the cache; no bucket is larger.
        capture: replaces `capture_graph` in tests.
    """

    def __init__(self, compute: Callable[..., torch.Tensor], *, slots: int, capacity: int, capture=None):
        self.compute = compute
        self.slots, self.capacity = slots, capacity
        self.capture = capture or capture_graph
        self.graphs: dict[Shape, tuple[Callable[[], None], torch.Tensor]] = {}
        self.pool: Any = None
        self.works = True

    def __call__(self, rows: int, pending: int, windows: bool, all_lines: bool, longest: int) -> torch.Tensor:
        """Logits `[lines, V]` of the first `rows` rows: of all 12 cells each, or of 6 or 1 (without windows)."""
        asked = (rows, pending, windows, all_lines, longest)
        if not self.works:
            return self.compute(*asked)
        shape = bucket(*asked, slots=self.slots, capacity=self.capacity)
        if shape not in self.graphs:
            try:
                self.graphs[shape] = self.capture(self.compute, shape, self)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.warning_once(
                    f"the decode step cannot be captured as a CUDA graph, running it as it is: {error}"
                )
                self.works, self.graphs = False, {}
                return self.compute(*asked)
        replay, logits = self.graphs[shape]
        replay()
        return logits[: len(logits) // shape[0] * rows]


def capture_graph(compute: Callable[..., torch.Tensor], shape: Shape, graphs: DecodeGraphs):
    """Captures one shape; all graphs share a pool, for only one runs at a time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            compute(*shape)  # writes what the replay will write, so it may run any number of times
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=graphs.pool):
        logits = compute(*shape)
    graphs.pool = graph.pool()
    return graph.replay, logits
