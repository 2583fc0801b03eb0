"""The engine on an accelerator, as far as a stand-in for one shows it: goldens, captures, what goes over the bus."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

import locateanything.cuda_graphs as cuda_graphs
from locateanything.generation import GenerationLoop
from tests.conftest import Batch, cases_of, recorded_cases
from tests.pretend_device import DEVICE, TO_DEVICE, TO_HOST, WAITS, Generator, OnDevice, PretendDevice, capture_by


@pytest.fixture
def device():
    with PretendDevice() as device:
        yield device


def on(device: PretendDevice, name: str, cases: list[dict]) -> Batch:
    batch = Batch(name, cases)
    batch.model = device.put_model(batch.model)
    batch.generators = lambda: [Generator().manual_seed(case.get("seed", 0)) for case in cases]
    return batch


def with_graphs(device: PretendDevice, patch: pytest.MonkeyPatch, uses: int = 1) -> list[tuple]:
    """Steps are captured, when a shape has so many uses, and replayed by the device. Returns the list of shapes that
    are captured from now on."""
    captured = []

    def capture(graphs, compute, shape):
        for _ in range(cuda_graphs.WARM_UP_STEPS):
            compute(shape)
        captured.append(shape)
        return device.capture(lambda: compute(shape))

    capture_by(capture, patch, uses)
    return captured


def events_of_steps(device: PretendDevice, patch: pytest.MonkeyPatch) -> list[Counter]:
    """What went over the bus in each step from now on that no row enters."""
    steps = []
    step = GenerationLoop.step

    def counted(loop, *args):
        before, entering = len(device.events), bool(loop.waiting)
        told = step(loop, *args)
        if not entering and loop.active:
            steps.append(Counter(event.kind for event in device.events[before:]))
        return told

    patch.setattr(GenerationLoop, "step", counted)
    return steps


# ---- the stand-in itself


def test_it_sees_what_goes_between_host_and_device(device):
    def seen(act) -> list[str]:
        before = len(device.events)
        act()
        return [event.kind for event in device.events[before:]]

    x = OnDevice(torch.arange(6.0))
    assert seen(lambda: (x + 1) * x.sum()) == []
    assert seen(lambda: torch.tensor([1, 2], device=DEVICE)) == [TO_DEVICE]
    assert seen(lambda: x.copy_(torch.zeros(6))) == [TO_DEVICE]
    assert seen(lambda: x.__setitem__(2, 7.0)) == [TO_DEVICE]
    assert seen(lambda: x.__setitem__(slice(0, 2), 7.0)) == []
    assert seen(lambda: x[[0, 1]]) == [TO_DEVICE]
    assert seen(lambda: x.tolist()) == seen(lambda: x.cpu()) == [TO_HOST]
    assert seen(lambda: float(x[0])) == seen(lambda: x.any() and None) == [WAITS]
    assert seen(lambda: x[x > 3]) == seen(lambda: x.nonzero()) == [WAITS]
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.zeros(6)


def test_a_replay_reads_memory_anew_and_asks_python_nothing(device):
    x, asked = OnDevice(torch.zeros(3)), []

    def compute():
        asked.append(True)
        return (x + len(asked)).view(3, 1).expand(3, 2) * 2

    replay, result = device.capture(compute)
    x += 10
    assert result.tolist() == [[2, 2]] * 3
    replay()
    assert result.tolist() == [[22, 22]] * 3 and len(asked) == 1
    assert not device.violations
    device.capture(lambda: x.tolist())
    assert [event.kind for event in device.violations] == [TO_HOST]


# ---- the engine on it


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_goldens(golden, graphs, device, monkeypatch):
    captured = with_graphs(device, monkeypatch) if graphs else []
    batch = on(device, golden, random.Random(golden).sample(cases_of(golden), 8))
    assert batch.answers(batch.run(max_batch_rows=7)) == batch.expected()
    assert len(captured) > 2 if graphs else not captured
    assert not device.violations and isinstance(batch.model.get_input_embeddings().weight, OnDevice)


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("slots", [1, 32])
def test_every_golden(golden, graphs, slots, device, monkeypatch):
    if graphs:
        with_graphs(device, monkeypatch)
    batch = on(device, golden, cases_of(golden))
    output = batch.run(max_batch_rows=slots)
    assert batch.answers(output) == batch.expected()
    assert output.row_forwards.tolist() == [case["forward_step"] for case in batch.cases]
    assert not device.violations
    slow = on(device, golden, [case for case in cases_of(golden) if case["generation_mode"] == "slow"])
    assert slow.answers(slow.run(generation_mode="verified", max_batch_rows=slots)) == slow.expected()


RANDOM_BATCHES = [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 300))]


@pytest.mark.parametrize("seed", RANDOM_BATCHES)
def test_random_batches_with_graphs(seed, device, monkeypatch):
    with_graphs(device, monkeypatch)
    rng = random.Random(seed)
    name = rng.choice(["shapes", "shapes-early"])
    cases = rng.choices(cases_of(name), k=rng.choice([2, 3, 5, 8, 13, 24] if seed >= 4 else [2, 3, 5]))
    batch = on(device, name, cases)
    assert batch.answers(batch.run(max_batch_rows=rng.choice([None, 1, 3, 7]))) == batch.expected()
    assert not device.violations


@pytest.mark.parametrize("mode", ["eager", "hybrid", "fast", "slow", "verified"])
def test_a_greedy_step_takes_one_copy_up_and_one_down(mode, device, monkeypatch):
    if mode != "eager":
        with_graphs(device, monkeypatch)
    slow = [case for case in recorded_cases("shapes") if "seed" not in case and case["generation_mode"] == "slow"]
    batch = on(device, "shapes", slow[:3])
    batch.settings["generation_mode"] = "hybrid" if mode == "eager" else mode
    batch.run(max_new_tokens=3)  # constants of the rules are copied once
    steps = events_of_steps(device, monkeypatch)
    batch.run()
    assert len(steps) > 2
    assert set(map(tuple, (sorted(step.items()) for step in steps))) == {((TO_DEVICE, 1), (TO_HOST, 1))}


def test_rows_that_enter_together_make_the_host_wait_once(device, monkeypatch):
    """Whether what they share is finite is asked for all of them at once; their tokens go up in one copy."""
    same = [case for case in cases_of("shapes") if case["images"] == cases_of("shapes")[0]["images"]]
    seen = {}
    for rows in (4, 9):
        batch = on(device, "shapes", (same * 9)[:rows])
        begun = len(device.events)
        enter = GenerationLoop.enter

        def entered(loop, enter=enter, rows=rows):
            before = len(device.events)
            enter(loop)
            seen.setdefault(rows, Counter(event.kind for event in device.events[before:]))

        with monkeypatch.context() as patch:
            patch.setattr(GenerationLoop, "enter", entered)
            batch.run(max_new_tokens=2)
        assert sum("write_tokens" in event.place for event in device.events[begun:]) == 1
    assert seen[4] == seen[9] and (seen[9][TO_HOST], seen[9][WAITS]) == (1, 0)


def test_the_layers_copy_nothing(device, monkeypatch):
    """Neither in a prefill pass nor in a step: all they need is on the device before the first of them."""
    batch = on(device, "shapes", cases_of("shapes")[:6])
    passes = []
    decode = type(batch.model).decode

    def watched(*args):
        before = len(device.events)
        result = decode(*args)
        passes.append(device.events[before:])
        return result

    monkeypatch.setattr(type(batch.model), "decode", watched)
    batch.run()
    assert len(passes) > 5 and not any(passes)
