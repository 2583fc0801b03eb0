"""The room of CUDA graphs, as far as a CPU goes: buckets, replay from persistent buffers, falling back."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import locateanything.cuda_graphs as cuda_graphs
from locateanything.generation import GenerationLoop
from locateanything.kv_cache import KEY_BLOCK
from tests.conftest import Batch, cases_of


@given(
    rows=st.integers(1, 64),
    pending=st.integers(1, 6),
    windows=st.booleans(),
    all_lines=st.booleans(),
    longest=st.integers(1, 5000),
    more=st.integers(0, 30),
)
def test_a_bucket_holds_the_step_and_little_more(rows, pending, windows, all_lines, longest, more):
    slots, capacity = rows + more, longest + more
    b_rows, b_pending, b_windows, b_all_lines, b_longest = cuda_graphs.bucket(
        rows, pending, windows, all_lines, longest, slots=slots, capacity=capacity
    )
    assert rows <= b_rows <= min(slots, 2 * rows) and (b_windows, b_all_lines) == (windows, all_lines)
    assert b_pending == (1 if pending == 1 and not windows else 6)
    assert longest <= b_longest <= min(capacity, max(longest + KEY_BLOCK - 1, longest * 5 // 4 + 1))


def test_few_shapes_occur():
    shapes = {
        cuda_graphs.bucket(rows, 6, True, False, longest, slots=32, capacity=4096)
        for rows in range(1, 33)
        for longest in range(300, 2400)
    }
    assert len(shapes) <= 8 * 20


@pytest.fixture
def fake_capture(monkeypatch):
    """Graphs on CPU: a replay computes the captured shape again into the same tensor."""
    captured = []

    def capture(compute, shape, graphs):
        logits = compute(*shape)
        captured.append(shape)

        def replay():
            logits.copy_(compute(*shape))

        return replay, logits

    monkeypatch.setattr(cuda_graphs, "capture_graph", capture)
    init = GenerationLoop.__init__
    monkeypatch.setattr(GenerationLoop, "__init__", lambda *args, **kwargs: init(*args, **{**kwargs, "graphs": True}))
    return captured


@pytest.mark.parametrize("slots", [None, 1, 5])
def test_answers_are_the_same_from_graphs(golden, fake_capture, slots):
    cases = random.Random(golden).sample(cases_of(golden), 40)
    batch = Batch(golden, cases)
    output = batch.run(max_batch_rows=slots)
    assert batch.answers(output) == batch.expected()
    assert output.row_forwards.tolist() == [case["forward_step"] for case in cases]
    steps = int(output.row_forwards.max())
    assert fake_capture and len(fake_capture) == len(set(fake_capture)) <= max(30, steps)


def test_verified_answers_are_the_same_from_graphs(fake_capture):
    cases = [case for case in cases_of("shapes") if case["generation_mode"] == "slow"][::4]
    others = [case for case in cases_of("shapes") if case["generation_mode"] == "hybrid"][::12]
    batch = Batch("shapes", cases + others)
    output = batch.run(generation_mode=["verified"] * len(cases) + ["hybrid"] * len(others), max_batch_rows=7)
    assert batch.answers(output) == batch.expected()
    assert any(all_lines for *_, all_lines, _ in fake_capture)


def test_a_failed_capture_falls_back(fake_capture, monkeypatch):
    def fails(compute, shape, graphs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture_graph", fails)
    batch = Batch("shapes", cases_of("shapes")[:10])
    assert batch.answers(batch.run()) == batch.expected()


def test_graphs_are_not_asked_for_on_cpu(shapes):
    assert not shapes._captures(None, torch.device("cpu"))
    assert not shapes._captures(True, torch.device("cpu"))
    assert shapes._captures(None, torch.device("cuda")) and not shapes._captures(False, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("graphs", [True, False])
def test_goldens_on_a_gpu(golden, graphs):
    from tests.conftest import CHECKPOINTS, model_of

    model = type(model_of(golden)).from_pretrained(CHECKPOINTS[golden]).to("cuda").eval()
    cases = [case for case in cases_of(golden) if "seed" not in case]
    batch = Batch(golden, cases)
    batch.model = model
    batch.inputs = {name: value.to("cuda") for name, value in batch.inputs.items()}
    output = batch.model.generate(
        **batch.inputs,
        **{name: value for name, value in batch.settings.items() if name not in ("temperature", "top_p", "top_k")},
        decode_graphs=graphs,
        return_dict_in_generate=True,
    )
    assert batch.answers(output) == batch.expected()
