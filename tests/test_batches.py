"""Property: whatever the batch, each row equals itself alone."""

from __future__ import annotations

import functools

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Batch, cases_of, recorded_cases

# Rows that no golden recorded: any prompt with any mode, limit and recipe, greedy or with its own generator.
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


def run(name: str, rows: list[dict], **kwargs) -> list[tuple[list[int], int]]:
    """(new ids with the padding cut off by the row's own count, forwards) of each row."""
    batch = Batch(name, [as_case(name, row) for row in rows])
    output = batch.run(**kwargs)
    new = output.sequences[:, batch.input_ids.shape[1] :].tolist()
    return list(zip(new, output.row_forwards.tolist(), strict=True))


@functools.cache
def alone(name: str, row: tuple) -> tuple[list[int], int]:
    return run(name, [dict(row)])[0]


def check(name: str, rows: list[dict], **kwargs) -> None:
    pad = Batch(name, [as_case(name, rows[0])]).model.config.pad_token_id
    for row, (ids, forwards) in zip(rows, run(name, rows, **kwargs), strict=True):
        own, own_forwards = alone(name, tuple(row.items()))
        assert ids[: len(own)] == own, row
        assert set(ids[len(own) :]) <= {pad}, row
        assert forwards == own_forwards, row


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(ROW, min_size=1, max_size=8), slots=st.sampled_from([None, 1, 2, 3]))
def test_a_row_does_not_depend_on_its_batch(rows, slots):
    check("shapes", rows, max_batch_rows=slots)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(ROW, min_size=1, max_size=8), slots=st.sampled_from([None, 1, 2, 3]))
def test_nor_where_answers_are_malformed(rows, slots):
    check("shapes-early", rows, max_batch_rows=slots)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(6)))
def test_order_does_not_matter(order):
    cases = [case for case in cases_of("shapes") if "seed" not in case][:60:10]
    batch = Batch("shapes", [cases[i] for i in order])
    assert batch.answers(batch.run()) == batch.expected()


def test_identical_rows_give_identical_answers():
    case = next(case for case in cases_of("shapes") if case["generation_mode"] == "hybrid" and case["switch_to_ar"])
    batch = Batch("shapes", [case] * 9)
    assert batch.answers(batch.run()) == [case["output_ids"]] * 9


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


def test_whole_grids_answer_as_packed_tokens_do(golden, monkeypatch):
    """The layout of an accelerator, whose shapes do not depend on the rows' modes."""
    import locateanything.generation as generation

    monkeypatch.setattr(generation, "packs", lambda device: False)
    cases = cases_of(golden)[::3]
    batch = Batch(golden, cases)
    output = batch.run(max_batch_rows=11)
    assert batch.answers(output) == batch.expected()
    assert output.row_forwards.tolist() == [case["forward_step"] for case in cases]
