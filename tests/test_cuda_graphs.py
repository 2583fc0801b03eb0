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
    longest=st.integers(1, 5000),
    more=st.integers(0, 30),
)
def test_a_bucket_holds_the_step_and_little_more(rows, pending, windows, longest, more):
    slots, capacity = rows + more, longest + more
    b_rows, b_pending, b_windows, b_longest = cuda_graphs.bucket(
        rows, pending, windows, longest, slots=slots, capacity=capacity
    )
    assert rows <= b_rows <= min(slots, 2 * rows) and b_windows == windows
    assert b_pending == (1 if pending == 1 and not windows else 6)
    assert longest <= b_longest <= min(capacity, max(longest + KEY_BLOCK - 1, longest * 5 // 4 + 1))


def test_few_shapes_occur():
    shapes = {
        cuda_graphs.bucket(rows, 6, True, longest, slots=32, capacity=4096)
        for rows in range(1, 33)
        for longest in range(300, 2400)
    }
    assert len(shapes) <= 8 * 20


def simulate_graphs(monkeypatch) -> list[tuple]:
    """Graphs on CPU: a replay computes the captured shape, wider than the active rows, into the same tensor. Returns
    the list of shapes that are captured from now on."""
    captured = []

    def capture(graphs, shape):
        hidden = graphs.compute(*shape)
        captured.append(shape)

        def replay():
            hidden.copy_(graphs.compute(*shape))

        return replay, hidden

    monkeypatch.setattr(cuda_graphs, "capture_graph", capture)
    init = GenerationLoop.__init__
    monkeypatch.setattr(GenerationLoop, "__init__", lambda *args, **kwargs: init(*args, **{**kwargs, "graphs": True}))
    return captured


@pytest.fixture
def captured(monkeypatch) -> list[tuple]:
    return simulate_graphs(monkeypatch)


def test_many_rows_share_few_graphs(golden, captured):
    batch = Batch(golden, random.Random(golden).sample(cases_of(golden), 40))
    output = batch.run(max_batch_rows=17)
    assert batch.answers(output) == batch.expected()
    assert 3 < len(captured) == len(set(captured)) <= 30


def test_an_empty_slot_has_nothing_to_do(captured):
    """Three rows are left, each with one token to feed, in a bucket of four: with what the finished row of the fourth
    had to feed, four tokens, the step would read behind its grid, and on CUDA end the process."""
    slow = [case for case in cases_of("shapes") if case["generation_mode"] == "slow" and "seed" not in case][:3]
    fast = next(case for case in cases_of("shapes") if case["generation_mode"] == "fast" and "seed" not in case)
    batch = Batch("shapes", [*slow, {**fast, "max_new_tokens": 1}])
    assert batch.answers(batch.run())[:3] == batch.expected()[:3]


def test_a_failed_capture_falls_back(captured, monkeypatch):
    def fails(graphs, shape):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture_graph", fails)
    batch = Batch("shapes", cases_of("shapes")[:10])
    assert batch.answers(batch.run()) == batch.expected()


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
