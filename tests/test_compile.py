"""generate(compile=True): the same answers from compiled layers, on a CPU too."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch._dynamo.utils import counters

from tests.conftest import Batch, cases_of


@pytest.fixture(params=["eager", "inductor"])
def backend(request, monkeypatch) -> str:
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile, backend=request.param))
    torch.compiler.reset()
    counters.clear()
    yield request.param
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_layers_answer_alike(backend):
    batch = Batch("shapes", cases_of("shapes")[:40:4])
    batch.model = copy.deepcopy(batch.model)
    assert batch.answers(batch.run(compile=True)) == batch.expected()
    made = counters["stats"]["unique_graphs"]
    assert 0 < made < 40 and all(layer._compiled_call_impl for layer in batch.model.get_decoder().layers)
    assert batch.answers(batch.run(compile=True, max_batch_rows=3)) == batch.expected()
    assert counters["stats"]["unique_graphs"] <= made + 4, "compiled once, whatever the layer and the number of tokens"
