"""On a CUDA device: what the stand-in of tests/pretend_device.py cannot show."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

import locateanything.cuda_graphs as cuda_graphs
from tests.conftest import CHECKPOINTS, Batch, cases_of, model_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on(device: str, name: str, **loading) -> Batch:
    """The greedy goldens of a set, on a device; draws there are other ones."""
    batch = Batch(name, [case for case in cases_of(name) if "seed" not in case])
    batch.model = type(model_of(name)).from_pretrained(CHECKPOINTS[name], **loading).to(device).eval()
    batch.inputs = {key: value.to(device) for key, value in batch.inputs.items()}
    batch.generators = lambda: None
    return batch


@pytest.fixture
def captures(monkeypatch) -> list[tuple]:
    """The shapes captured from now on, each at its first use."""
    shapes = []
    capture = cuda_graphs.capture_graph

    def noted(graphs, compute, shape):
        shapes.append(shape)
        return capture(graphs, compute, shape)

    monkeypatch.setattr(cuda_graphs, "capture_graph", noted)
    monkeypatch.setattr(cuda_graphs, "WORTH_CAPTURING", 1)
    return shapes


@pytest.mark.parametrize("graphs", [True, False])
def test_goldens(golden, graphs, captures):
    batch = on("cuda", golden)
    assert batch.answers(batch.run(decode_graphs=graphs, max_batch_rows=24)) == batch.expected()
    assert bool(captures) == graphs


@pytest.mark.parametrize("graphs", [True, False])
def test_verified_goldens(golden, graphs):
    batch = on("cuda", golden)
    slow = [case["generation_mode"] == "slow" for case in batch.cases]
    answers = batch.answers(batch.run(generation_mode="verified", decode_graphs=graphs))
    told = [answer for answer, counts in zip(answers, slow, strict=True) if counts]
    assert told == [case["output_ids"] for case, counts in zip(batch.cases, slow, strict=True) if counts]


def test_graphs_are_kept_between_calls_until_a_weight_moves(captures):
    batch = on("cuda", "shapes")
    assert batch.answers(batch.run()) == batch.expected()
    before = len(captures)
    assert batch.answers(batch.run()) == batch.expected() and len(captures) == before > 0
    batch.model.to("cpu").to("cuda")
    assert batch.answers(batch.run()) == batch.expected() and len(captures) > before


def test_memory_is_given_back():
    batch = on("cuda", "shapes")
    batch.run(max_batch_rows=8)  # libraries take workspaces, and keep them
    batch.model.release_memory()
    before = torch.cuda.memory_allocated()
    batch.run(max_batch_rows=8)
    assert torch.cuda.memory_allocated() > before
    batch.model.release_memory()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_model_beside_the_current_device(captures):
    batch = on("cuda:1", "shapes")
    torch.cuda.set_device(0)
    assert batch.answers(batch.run()) == batch.expected() and captures


def test_captures_beside_other_threads_work(captures):
    """Which allocates, copies and waits, each of which would end a capture that were not its thread's own."""
    done = threading.Event()
    errors = []

    def work():
        try:
            while not done.is_set():
                x = torch.randn(512, 512, device="cuda")
                (x @ x).sum().item()
                del x
                torch.cuda.empty_cache()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        batch = on("cuda", "shapes")
        assert batch.answers(batch.run()) == batch.expected() and captures
    finally:
        done.set()
        thread.join()
    assert not errors


def test_two_models_capture_at_once(captures):
    batches = [on("cuda", name) for name in CHECKPOINTS]
    answers = {}

    def run(batch):
        answers[id(batch)] = batch.answers(batch.run())

    threads = [threading.Thread(target=run, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers.get(id(batch)) for batch in batches] == [batch.expected() for batch in batches]


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash_attn is not installed")
def test_flash_attention_in_half_precision(captures):
    """Another kernel in bfloat16 rounds otherwise, so most rows, not all, are those of float32."""
    batch = on("cuda", "shapes", attn_implementation="flash_attention_2", dtype=torch.bfloat16)
    answers = batch.run().sequences[:, batch.input_ids.shape[1] :].tolist()
    right = [answer[: len(told)] == told for answer, told in zip(answers, batch.expected(), strict=True)]
    assert sum(right) >= 0.9 * len(right) and captures
