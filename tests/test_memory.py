"""Running out of memory, injected: the loop goes on with half of everything and every answer stays right."""

from __future__ import annotations

import random

import pytest
import torch

from locateanything.generation import GenerationLoop
from locateanything.kv_cache import DecodeStep, PrefillStep
from tests.conftest import Batch, cases_of


def batch_of(count: int) -> Batch:
    return Batch("shapes", random.Random(count).sample([c for c in cases_of("shapes") if "seed" not in c], count))


class Shortage:
    """Raises out-of-memory at chosen calls of a method, and records what the calls were given."""

    def __init__(self, monkeypatch, owner, name, when):
        self.calls, self.raised = 0, 0
        original = getattr(owner, name)

        def short(*args, **kwargs):
            self.calls += 1
            if when(self.calls, *args):
                self.raised += 1
                raise torch.OutOfMemoryError("injected")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, short)


@pytest.mark.parametrize("kind", [PrefillStep, DecodeStep])
@pytest.mark.parametrize("limit", [1, 3, 6])
def test_a_step_too_large_is_done_in_smaller_ones(monkeypatch, kind, limit):
    batch = batch_of(13)

    def too_large(call, embeddings, step, cache):
        return isinstance(step, kind) and len(set(step.slots.tolist())) > limit

    shortage = Shortage(monkeypatch, batch.model, "decode", too_large)
    output = batch.run(max_batch_rows=8)
    assert shortage.raised
    assert batch.answers(output) == batch.expected()
    assert output.row_forwards.tolist() == [case["forward_step"] for case in batch.cases]


@pytest.mark.parametrize("call", [1, 2, 5, 11])
@pytest.mark.parametrize("name", ["extract_feature", "decode", "logits"])
def test_any_single_failure_loses_nothing(monkeypatch, name, call):
    batch = batch_of(9)
    shortage = Shortage(monkeypatch, batch.model, name, lambda number, *args: number == call)
    assert batch.answers(batch.run(max_batch_rows=4)) == batch.expected()
    assert shortage.raised == (shortage.calls >= call)


def test_finished_rows_are_not_decoded_again(monkeypatch):
    batch = batch_of(6)
    done = []
    halve = GenerationLoop.halve

    def note(loop, error):
        done.append(len(batch.cases) - len(loop.active) - len(loop.waiting))
        return halve(loop, error)

    monkeypatch.setattr(GenerationLoop, "halve", note)
    Shortage(monkeypatch, batch.model, "logits", lambda number, *args: number in (12, 20))
    output = batch.run()
    assert batch.answers(output) == batch.expected()
    assert output.row_forwards.tolist() == [case["forward_step"] for case in batch.cases]
    assert done and done[0]


def test_what_cannot_work_raises_at_last(monkeypatch):
    batch = batch_of(3)
    with monkeypatch.context() as patch:
        shortage = Shortage(patch, batch.model, "decode", lambda *args: True)
        with pytest.raises(torch.OutOfMemoryError):
            batch.run()
        assert shortage.calls < 20
    assert batch.answers(batch.run()) == batch.expected(), "the model is usable afterwards"
