"""Property: whatever the batch, each row equals itself alone."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import locateanything.model_runner as model_runner
from tests.conftest import Batch, cases_of, recorded_cases
from tests.test_cuda_graphs import simulate_graphs

# Rows that no golden recorded: any prompt with any mode, limit and sampling parameters, greedy or with a generator.
ROW = st.fixed_dictionaries(
    {
        "prompt": st.integers(0, 59),
        "generation_mode": st.sampled_from(["hybrid", "fast", "slow", "verified"]),
        "verify_labels": st.booleans(),
        "max_new_tokens": st.integers(1, 40),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "temperature": st.sampled_from([0.0, 0.0, 0.7, 1.5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "top_k": st.sampled_from([0, 20]),
        "seed": st.integers(0, 3),
    }
)


@functools.lru_cache
def prompts(name: str) -> list[dict]:
    """One case per picture and question."""
    return list({case["case"]: case for case in cases_of(name)}.values())


def as_case(name: str, row: dict) -> dict:
    prompt = prompts(name)[row["prompt"] % len(prompts(name))]
    return {"input_ids": prompt["input_ids"], "images": prompt["images"], **row}


def run(name: str, rows: list[dict], **kwargs) -> list[tuple]:
    """Of each row: new ids, how each was accepted, why the row ended, forwards; and its log-probabilities."""
    batch = Batch(name, [as_case(name, row) for row in rows])
    output = batch.run(output_scores=True, **kwargs)
    told = []
    for row in range(len(rows)):
        own = output.accepted_by[row] >= 0
        ids = output.sequences[row, batch.input_ids.shape[1] :]
        assert (ids[~own] == batch.model.config.pad_token_id).all() and output.token_log_probs[row, ~own].isnan().all()
        facts = ids[own].tolist(), output.accepted_by[row, own].tolist(), output.finish_reasons[row]
        told.append((*facts, int(output.row_forwards[row]), output.token_log_probs[row, own]))
    return told


@functools.cache
def alone(name: str, row: tuple) -> tuple:
    return run(name, [dict(row)])[0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(["shapes", "shapes-early"]),
    rows=st.lists(ROW, min_size=1, max_size=8),
    slots=st.sampled_from([None, 1, 2, 3]),
    layout=st.sampled_from(["packed", "grid", "graphs"]),
)
def test_a_row_does_not_depend_on_its_batch(name, rows, slots, layout):
    """Tokens, phases, reasons and forwards are equal, scores as near as float32 products of other shapes are."""
    with pytest.MonkeyPatch.context() as patch:
        if layout == "grid":
            patch.setattr(model_runner, "packs", lambda device: False)
        if layout == "graphs":
            simulate_graphs(patch)
        together = run(name, rows, max_batch_rows=slots)
    for row, (*facts, scores) in zip(rows, together, strict=True):
        *own_facts, own_scores = alone(name, tuple(row.items()))
        assert facts == own_facts, row
        torch.testing.assert_close(scores, own_scores, atol=1e-3, rtol=1e-3)


def test_padding_content_does_not_matter():
    cases = [case for case in cases_of("shapes") if "seed" not in case][:30:3]
    batch = Batch("shapes", cases, extra_padding=5)
    padding = batch.attention_mask == 0
    batch.inputs["input_ids"] = batch.input_ids.masked_fill(padding, batch.model.config.box_start_token_id)
    batch.input_ids = batch.inputs["input_ids"]
    assert batch.answers(batch.run()) == batch.expected()


def test_one_generator_draws_for_all_rows_reproducibly():
    cases = [case for case in recorded_cases("shapes") if case.get("temperature") == 1.3][:4]
    batch = Batch("shapes", cases)
    first = batch.run(generator=torch.Generator().manual_seed(5)).sequences
    again = batch.run(generator=torch.Generator().manual_seed(5)).sequences
    other = batch.run(generator=torch.Generator().manual_seed(6)).sequences
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
