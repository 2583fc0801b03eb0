"""Answers that go round in circles end; others do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locateanything.stopping import DegenerateAnswerCriteria, read_boxes
from tests.conftest import Batch, cases_of, model_of, tokenizer_of

ROLES = model_of("shapes").config.token_roles


def ids_of(text: str) -> list[int]:
    return tokenizer_of("shapes").encode(text)


def box(*coordinates: int) -> str:
    return f"<box>{''.join(f'<{c}>' for c in coordinates)}</box>"


A, B, D = box(1, 2, 3, 4), box(5, 6, 7, 8), box(9, 9)
NONE = "<box>none</box>"


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("", None),
        ("<ref>a</ref>", None),
        (A, None),
        (A + B, None),
        (A + A, A),
        (f"<ref>a</ref>{A}{A}", f"<ref>a</ref>{A}"),
        (f"<ref>a</ref>{A}<ref>a</ref>{A}", f"<ref>a</ref>{A}"),
        (f"<ref>a</ref>{A}<ref>b</ref>{A}", None),  # one thing may have two names
        (A + B + A, None),
        (A + B + A + B, A + B),
        (A + B + D + A + B + D, A + B + D),
        (D + A + B + A + B, D + A + B),
        (f"{A}<ref>a</ref>{NONE}<ref>a</ref>{NONE}", f"{A}<ref>a</ref>{NONE}"),
        (f"<ref>a</ref>{NONE}<ref>b</ref>{NONE}", None),
        (f"{A} and {A}", None),  # prose between them: read alone
        (A + "<box><1><2><3></box>" + A, None),
        (A + A[: -len("</box>")], None),
        ("".join(box(x, 100, x + 5, 300) for x in range(0, 40, 5)), box(0, 100, 5, 300)),
        ("".join(box(10, y, 300, y + 9) for y in range(100, 20, -10)), box(10, 100, 300, 109)),
        ("".join(box(x, 100, x + 5, 300) for x in range(0, 35, 5)), None),  # seven
        ("".join(box(x, 100, x + 50, 300) for x in range(0, 400, 50)), None),  # not thin
        ("".join(box(x, 100, x + 5, 300) for x in range(0, 400, 50)), None),  # apart
        ("".join(box(x, 100 + x, x + 5, 300) for x in range(0, 40, 5)), None),  # not alike
        ("".join(box(x * x, 100, x * x + 5, 300) for x in range(8)), None),  # no equal steps
    ],
)
def test_what_is_kept(answer, kept):
    criterion = DegenerateAnswerCriteria(ROLES)
    ids = ids_of(answer)
    assert criterion.kept(ids) == (None if kept is None else len(ids_of(kept)))
    if ids:
        assert criterion(torch.tensor([ids]), None).tolist() == [kept is not None]


def test_numbers_are_arguments():
    once, cycle = ids_of(A + A), ids_of(A + B + A + B)
    assert DegenerateAnswerCriteria(ROLES, times=3).kept(once) is None
    assert DegenerateAnswerCriteria(ROLES, times=3).kept(ids_of(A * 3)) == len(ids_of(A))
    assert DegenerateAnswerCriteria(ROLES, period=1).kept(cycle) is None
    thin = ids_of("".join(box(x, 100, x + 5, 300) for x in range(0, 15, 5)))
    assert DegenerateAnswerCriteria(ROLES, march=3).kept(thin) == len(ids_of(A))
    assert DegenerateAnswerCriteria(ROLES, march=3, thin=4).kept(thin) is None
    assert (
        DegenerateAnswerCriteria(ROLES, march=0).kept(ids_of("".join(box(x, 1, x + 5, 3) for x in range(0, 99, 5))))
        is None
    )
    assert DegenerateAnswerCriteria(ROLES, prompt_length=6)(torch.tensor([once]), None).tolist() == [False]


@pytest.mark.parametrize(
    "options", [{"period": 0}, {"times": 1}, {"march": 2}, {"thin": -1}, {"period": True}, {"times": 2.5}]
)
def test_numbers_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        model_of("shapes").degenerate_answer_criteria(**options)


MARKS = [ROLES.box_start, ROLES.box_end, ROLES.ref_start, ROLES.ref_end, ROLES.none]
COORDINATES = range(ROLES.coord_start, ROLES.coord_start + 3)


@given(st.lists(st.sampled_from([*range(12), *MARKS, *COORDINATES]), max_size=40))
def test_any_ids_are_read(ids):
    for one in read_boxes(ids, ROLES, most=16):
        assert ids[one.start] in (ROLES.box_start, ROLES.ref_start)
        assert len(one.coordinates) in (0, 2, 4)
    kept = DegenerateAnswerCriteria(ROLES, march=3).kept(ids)
    assert kept is None or 0 < kept < len(ids)


# ---- in generate


def repeating(mode: str) -> list[dict]:
    """Greedy golden cases of the half-trained network that say a box twice at once."""
    found = []
    for case in cases_of("shapes-early"):
        if case["generation_mode"] == mode and "seed" not in case and cut(case) is not None:
            found.append(case)
    return found


def cut(case: dict) -> int | None:
    criterion = DegenerateAnswerCriteria(model_of("shapes-early").config.token_roles)
    ids = case["output_ids"]
    kept = (criterion.kept(ids[:end]) for end in range(1, len(ids) + 1))
    return next((length for length in kept if length is not None), None)


@pytest.mark.parametrize("mode", ["hybrid", "fast"])
def test_rows_end_before_their_first_repetition(mode):
    cases = repeating(mode)
    others = [case for case in cases_of("shapes-early") if "seed" not in case and cut(case) is None][:6]
    assert len(cases) >= 3
    batch = Batch("shapes-early", cases + others)
    criterion = batch.model.degenerate_answer_criteria()
    output = batch.run(stopping_criteria=[criterion], output_scores=True)
    for row, case in enumerate(batch.cases):
        length = int((~output.scores[row].isnan()).sum())
        new = output.sequences[row, batch.input_ids.shape[1] :]
        assert new[:length].tolist() == case["output_ids"][: cut(case)]
        assert (new[length:] == batch.model.config.pad_token_id).all()
        assert (output.accepted_by[row] >= 0).sum() == length
        assert output.row_forwards[row] < case["forward_step"] or cut(case) is None
    text = tokenizer_of("shapes").decode(output.sequences[0, batch.input_ids.shape[1] :])
    assert text.count("<box>") < cases[0]["output"].count("<box>")


def test_the_stock_call_gives_the_cut_text_and_its_history():
    case = repeating("hybrid")[0]
    batch, tokenizer = Batch("shapes-early", [case]), tokenizer_of("shapes")
    text, history, statistics = batch.model.generate(
        **batch.inputs, tokenizer=tokenizer, verbose=True, stopping_criteria=[batch.model.degenerate_answer_criteria()]
    )
    assert text == tokenizer.decode(case["output_ids"][: cut(case)])
    assert "".join(piece for _, piece in history) == text
    assert f"num_tokens={cut(case)};" in statistics


def test_transformers_generate_takes_it_too():
    """On the plain model, whose generate is transformers' own: rows end, what they said stays."""
    from locateanything.modeling_locateanything_batched import LocateAnythingForConditionalGeneration
    from tests.conftest import CHECKPOINTS

    model = LocateAnythingForConditionalGeneration.from_pretrained(CHECKPOINTS["shapes-early"]).eval()
    case = cases_of("shapes-early")[0]
    batch = Batch("shapes-early", [case])
    start = ids_of("<ref>a</ref>" + A)
    roles = model.config.token_roles

    class Repeats:
        """Says one box over and over."""

        def __call__(self, input_ids, scores):
            said = input_ids.shape[1] - len(case["input_ids"])
            token = start[said] if said < len(start) else start[-6 + (said - len(start)) % 6]
            return torch.full_like(scores, -float("inf")).index_fill(1, torch.tensor([token]), 0.0)

    criterion = DegenerateAnswerCriteria(roles, prompt_length=len(case["input_ids"]))
    output = model.generate(
        **batch.inputs,
        max_new_tokens=60,
        do_sample=False,
        logits_processor=[Repeats()],
        stopping_criteria=[criterion],
        pad_token_id=0,
    )
    answer = output[0, len(case["input_ids"]) :].tolist()
    assert answer == start + start[-6:]
    assert criterion.kept(answer) == len(start)
