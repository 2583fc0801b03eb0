"""Kernels launched and copies made by decode steps, counted on the stand-in device of tests/pretend_device.py.

    python -m benchmarks.operations [--graphs]

A count, not a time: it needs no accelerator. Layers are counted on the goldens' four, and told for 36.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from contextlib import nullcontext
from statistics import median
from unittest import mock

from tests import conftest  # the flat files as the package `locateanything`
from tests.pretend_device import TO_DEVICE, TO_HOST, WAITS, Generator, PretendDevice

# isort: split
from locateanything import cuda_graphs
from locateanything.generation import GenerationLoop

LAYERS = 36
GREEDY = {"repetition_penalty": 1.0, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
SETTINGS = {
    "hybrid": {"generation_mode": "hybrid"},
    "slow": {"generation_mode": "slow"},
    "verified": {"generation_mode": "verified"},
    "hybrid, sampled": {"generation_mode": "hybrid", "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--graphs", action="store_true", help="steps as CUDA graphs; a replay is one launch")
    arguments = parser.parse_args()
    cases = [c for c in conftest.cases_of("shapes") if c["generation_mode"] == "slow" and "seed" not in c]
    print("| what | step | kernels | up | down | waits |\n|---|---|---|---|---|---|")
    for name, settings in SETTINGS.items():
        device = PretendDevice()
        graphs = mock.patch.multiple(cuda_graphs, **captured(device)) if arguments.graphs else nullcontext()
        with device, graphs:
            batch = conftest.Batch("shapes", cases[: arguments.rows])
            batch.model = device.put_model(batch.model)
            batch.settings |= {**GREEDY, **settings}
            batch.generators = lambda: [Generator().manual_seed(row) for row in range(arguments.rows)]
            batch.run()  # constants are copied, and graphs captured, once
            for kind, steps in counted(device, batch).items():
                medians = [str(round(median(each))) for each in zip(*steps, strict=True)]
                print("|", " | ".join([name, kind, *medians]), "|")


def captured(device: PretendDevice) -> dict:
    """What takes the place of the real things in cuda_graphs.py."""

    def capture(graphs, compute, shape):
        compute(shape)
        replay, result = device.capture(lambda: compute(shape))

        def launch():
            device.operations.append("replay")
            replay()

        return launch, result

    return {"capture_graph": capture, "capturable": lambda *asked: True, "WORTH_CAPTURING": 1}


def counted(device: PretendDevice, batch: conftest.Batch) -> dict[str, list[tuple[int, ...]]]:
    """By kind of step, of each: kernels, copies to the device and to the host, other waits."""
    steps: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    step, decode, inside = GenerationLoop.step, type(batch.model).decode, []

    def decoding(*arguments):
        before = len(device.operations)
        hidden = decode(*arguments)
        inside.append(len(device.operations) - before)
        return hidden

    def stepping(loop):
        begun = len(device.events), len(device.operations)
        inside.clear()
        rows = [row for row in loop.active.values() if row.entered]
        told = step(loop)
        if rows or loop.active:
            kinds = [event.kind for event in device.events[begun[0] :]]
            kernels = len(device.operations) - begun[1] + sum(inside) * (LAYERS - layers) // layers
            kind = " and ".join(sorted({row.phase.name for row in rows})) or "all enter"
            steps[kind].append((kernels, *map(kinds.count, (TO_DEVICE, TO_HOST, WAITS))))
        return told

    layers = batch.model.config.text_config.num_hidden_layers
    with mock.patch.object(GenerationLoop, "step", stepping), mock.patch.object(type(batch.model), "decode", decoding):
        batch.run()
    return steps


if __name__ == "__main__":
    main()
