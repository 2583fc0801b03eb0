"""Answers that go round in circles end; others do not."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locateanything.answers import DegenerateAnswerCriteria
from locateanything.modeling_locateanything_batched import LocateAnythingForConditionalGeneration
from tests.conftest import CHECKPOINTS, Batch, cases_of, model_of, tokenizer_of

ROLES = model_of("shapes").config.token_roles


def ids_of(text: str) -> list[int]:
    return tokenizer_of("shapes").encode(text)


def box(*coordinates: int) -> str:
    return f"<box>{''.join(f'<{c}>' for c in coordinates)}</box>"


A, B, D = box(1, 2, 3, 4), box(5, 6, 7, 8), box(9, 9)
NONE = "<box>none</box>"


def row(count: int, width: int, pitch: int, axis: int = 0, start: int = 100) -> str:
    """Boxes side by side along an axis, from 40 to 300 on the other."""
    spans = [(start + pitch * i, start + pitch * i + width) for i in range(count)]
    return "".join(box(a, 40, b, 300) if axis == 0 else box(40, a, 300, b) for a, b in spans)


def lay(*boxes: tuple[int, ...]) -> str:
    return "".join(box(*place) for place in boxes)


def spread(count: int) -> str:
    return lay(*((20 * i, 20 * i) for i in range(count)))


ALONG = range(100, 150, 5)
FIRST = box(100, 40, 105, 300)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("", None),
        ("<ref>a</ref>", None),
        (A + B, None),
        (A + A, None),  # once may be a slip, and what follows would be lost
        (A + A + A, A),
        (f"<ref>a</ref>{A}<ref>a</ref>{A}{A}", f"<ref>a</ref>{A}"),
        (f"<ref>a</ref>{A}<ref>b</ref>{A}<ref>c</ref>{A}", None),  # one thing may have several names
        (A * 3 + "x", None),  # its last token is what must complete a repetition
        (A * 2 + A[: -len("</box>")], None),
        (spread(8) * 3, spread(8)),
        (spread(9) * 3, None),  # a longer cycle than is looked for
        (A + B + A + B + A, None),
        (D + (A + B) * 3, D + A + B),
        (f"{A}{f'<ref>a</ref>{NONE}' * 3}", f"{A}<ref>a</ref>{NONE}"),
        (f"<ref>a</ref>{NONE}<ref>b</ref>{NONE}<ref>c</ref>{NONE}", None),
        (f"{A} and {A}, {A}", f"{A} and "),
        ("<box><1><2><3></box>" * 3, "<box><1><2><3></box>"),
        ("".join(f"<box><1><2><3>{letter}</box>" for letter in "abcdefghij"), None),  # no coordinates
        (f"<ref>a</ref>,{A * 3}", f"<ref>a</ref>,{A}"),
        (f"<ref>a</ref>,{A}" * 3, f"<ref>a</ref>,{A}<ref>a</ref>,"),
        (f"<ref>a</ref><ref>b</ref>{A}<ref>c</ref>{A * 2}", None),
        # marches
        (row(9, 5, 5), None),
        (row(10, 5, 4), FIRST),
        (row(10, 5, -5), FIRST),
        (row(10, 5, 5, axis=1), box(40, 100, 300, 105)),
        (D + row(10, 5, 5), D + FIRST),  # whatever came before
        (row(10, 5, 5, start=0), box(0, 40, 5, 300)),
        (row(10, 5, 5, start=950), box(950, 40, 955, 300)),  # up to 1000
        (row(10, 1, 1), box(100, 40, 101, 300)),
        (row(10, 3, -1), box(100, 40, 103, 300)),
        (row(3, 5, 1), FIRST),  # nearly the same
        (row(10, 0, 1), box(100, 40, 100, 300)),
        (row(10, 0, 2), None),
        (row(10, 5, 6), None),  # apart
        (row(10, 6, 6), None),  # too thick
        (lay(*((x + 5, 300, x, 40) for x in ALONG)), box(105, 300, 100, 40)),  # corners the other way
        (lay(*((x, (40, 300)[x % 2], x + 5, (300, 40)[x % 2]) for x in ALONG)), FIRST),
        (lay(*((x, 40 + x % 2, x + 5, 300) for x in ALONG)), FIRST),
        (lay(*((x, 40 + 2 * (x % 2), x + 5, 300) for x in ALONG)), None),
        (lay(*((40 + x % 2 * 50, x, 300, x + 5) for x in ALONG)), None),
        (lay(*((x + 5, 40, x + 11 - x % 2, 300) for x in ALONG)), None),  # every other too thick, not the last
        (lay(*((x, 40 + x, x + 5, 300) for x in ALONG)), None),  # not alike
        (lay(*((x * x, 40, x * x + 5, 300) for x in range(10))), None),  # no equal steps
        (lay(*((x, 40, x + 5, 300) for x in (100 + (11 * i + 1) // 2 for i in range(10)))), None),  # steps 5, 6
        (lay(*((100 + i // 2, 40, 103 + i // 2, 300) for i in range(10))), None),  # each said twice
        (row(9, 5, 5) + "<ref>b</ref>" + box(145, 40, 150, 300), None),  # another thing
        *(
            (row(40, width, pitch, axis=1), None) for width, pitch in [(18, 20), (14, 16), (18, 19), (10, 20)]
        ),  # a table
        (lay(*((x, y) for x in range(0, 100, 4) for y in range(0, 8, 4))), None),
    ],
)
def test_what_is_kept(answer, kept):
    criterion = DegenerateAnswerCriteria(ROLES)
    ids = ids_of(answer)
    assert criterion.answer_to_keep(ids) == (None if kept is None else len(ids_of(kept)))
    if ids:
        assert criterion(torch.tensor([ids]), None).tolist() == [kept is not None]


def test_other_tokens_do_not_march():
    """Ids in equal steps that are no coordinates, or pass the last of them."""
    for first in (ROLES.coord_start - 60, ROLES.coord_end - 49):
        rows = [(first + 5 * i, ROLES.coord_start, first + 5 * i + 5, ROLES.coord_start + 9) for i in range(10)]
        ids = [token for inside in rows for token in (ROLES.box_start, *inside, ROLES.box_end)]
        assert DegenerateAnswerCriteria(ROLES).answer_to_keep(ids) is None


def cut_at(boxes: list[tuple[int, ...]], **options: int) -> int | None:
    """How many of these boxes are kept, asked after each."""
    criterion = DegenerateAnswerCriteria(ROLES, **options)
    ids = ids_of("<ref>a</ref>" + "".join(box(*place) for place in boxes))
    ends = [place + 1 for place, token in enumerate(ids) if token == ROLES.box_end]
    kept = next((kept for end in ends if (kept := criterion.answer_to_keep(ids[:end])) is not None), None)
    return None if kept is None else sum(token == ROLES.box_end for token in ids[:kept])


@pytest.mark.parametrize("seed", range(3))
def test_boxes_that_jitter_are_one(seed):
    """The fault: three hundred boxes that jitter by one to three thousandths never ended."""
    draw = random.Random(seed)
    x, y, w, h = (draw.randrange(20, 400) for _ in range(4))
    place = (x, y, x + w, y + h)
    around = [tuple(value + draw.choice((-3, -2, -1, 1, 2, 3)) for value in place) for _ in range(300)]
    assert cut_at([tuple(value + draw.randint(1, 3) for value in place) for _ in range(300)]) == 1
    assert cut_at(around) is not None and cut_at(around, tolerance=0) is None
    assert cut_at([tuple(value + 3 * i for value in place) for i in range(4)]) == (1 if min(w, h) > 11 else None)
    cycle = [(x, y, x + w, y + h), (x + 99, y, x + 99 + w, y + h), (x, y + 99, x + w, y + 99 + h)]
    assert cut_at([tuple(value + draw.randint(1, 3) for value in cycle[i % 3]) for i in range(300)]) == 3
    points = [(500 + draw.randint(1, 3), 500 + draw.randint(1, 3)) for _ in range(300)]
    assert cut_at(points) is not None


@pytest.mark.parametrize(
    ("place", "shift", "same"),
    [
        ((100, 100, 300, 300), (3, 3, 3, 3), True),
        ((100, 100, 300, 300), (4, 0, 0, 0), False),
        ((100, 100, 300, 300), (0, 0, 0, 4), False),
        ((0, 100, 300, 300), (3, 0, 0, 0), True),
        ((100, 100, 108, 300), (2, 3, 2, 3), True),  # a quarter of its side
        ((100, 100, 111, 300), (3, 0, 0, 0), False),
        ((100, 100, 300, 108), (3, 2, 3, 2), True),
        ((100, 100, 300, 111), (0, 0, 0, 3), False),
        ((500, 500), (1, 1), True),
        ((500, 500), (2, 0), False),
        ((500, 500), (0, 2), False),
    ],
)
def test_what_differs_by_no_more_is_the_same(place, shift, same):
    other = tuple(value + by for value, by in zip(place, shift, strict=True))
    assert cut_at([place, other, place]) == (1 if same else None)
    assert cut_at([place, other] * 3) == (1 if same else 2), "two that differ by more are a cycle of two"
    assert cut_at([place, other, place], tolerance=0) is None
    assert cut_at([(*place[:2], 900, 900), place[:2]] * 3) == 2, "a point is no box"


@pytest.mark.parametrize("pitch", [2, 3, 4, 6])
def test_small_things_in_a_row_are_several(pitch):
    """Real neighbours lie a few thousandths apart, too, but not within a quarter of their size."""
    size = pitch + 1
    grid = [(100 + pitch * i, 100 + pitch * j) for i in range(20) for j in range(15)]
    assert cut_at([(x, y, x + size, y + size) for x, y in grid], march=0) is None
    assert cut_at(grid) is None
    thick = [(100 + i * pitch, 100, 100 + i * pitch + 3 * pitch, 400) for i in range(100)]
    assert cut_at(thick, march=0) is None
    # another label is another thing
    again = "".join(f"<ref>{label}</ref>{box(100, 100, 300, 300)}" for label in "abcabdabe")
    assert DegenerateAnswerCriteria(ROLES).answer_to_keep(ids_of(again)) is None


def test_a_label_that_is_said_once_is_known():
    """However long ago: the criterion reads the whole answer once a box looks like one before it."""
    ids = ids_of("<ref>a</ref>" + "".join(box(i, 999 - i, i + 1, 1000 - i) for i in range(0, 990, 7)))
    for label, end in (("a", True), ("b", False)):
        said = ids + 2 * ids_of(A) + ids_of(f"<ref>{label}</ref>{A}")
        assert (DegenerateAnswerCriteria(ROLES).answer_to_keep(said) is not None) == end


@pytest.mark.parametrize(
    ("options", "answer", "kept"),
    [
        ({"times": 2}, A * 2, A),
        ({"times": 4}, A * 3, None),
        ({"period": 1}, (A + B) * 3, None),
        ({"march": 3}, row(3, 5, 5), A),
        ({"march": 3, "thin": 4}, row(3, 5, 5), None),
        ({"march": 3, "thin": 0}, row(3, 0, 1), A),
        ({"march": 0}, row(20, 5, 5), None),
    ],
)
def test_numbers_are_arguments(options, answer, kept):
    expected = None if kept is None else len(ids_of(kept))
    assert DegenerateAnswerCriteria(ROLES, **options).answer_to_keep(ids_of(answer)) == expected
    criterion = DegenerateAnswerCriteria(ROLES, prompt_length=len(ids_of(A)), **options)
    assert criterion(torch.tensor([ids_of(A + answer)]), None).tolist() == [kept is not None]


@pytest.mark.parametrize(
    ("name", "value"),
    [("period", 0), ("period", True), ("times", 1), ("times", 2.5), ("tolerance", -1), ("march", 2), ("march", -1),
     ("thin", -1), ("prompt_length", -1)],
)  # fmt: skip
def test_numbers_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        model_of("shapes").degenerate_answer_criteria(**{name: value})


MARKS = [ROLES.box_start, ROLES.box_end, ROLES.ref_start, ROLES.ref_end, ROLES.none]
COORDINATES = range(ROLES.coord_start, ROLES.coord_start + 3)


@given(st.lists(st.sampled_from([*range(12), *MARKS, *COORDINATES]), max_size=40))
def test_any_ids_are_read(ids):
    kept = DegenerateAnswerCriteria(ROLES, times=2, march=3).answer_to_keep(ids)
    assert kept is None or 0 < kept < len(ids)


# ---- in generate


class Says:
    """A logits processor by which the row with this prompt says these ids."""

    def __init__(self, prompt: list[int], ids: list[int]):
        self.prompt, self.ids = prompt, ids

    def __call__(self, input_ids, scores):
        if input_ids[0, : len(self.prompt)].tolist() != self.prompt:
            return scores
        token = self.ids[input_ids.shape[1] - len(self.prompt)]
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)


START = ids_of("<ref>red circle</ref>" + A)
ENDLESS = START + ids_of(A) * 100


def test_an_endless_answer_ends():
    """Neighbours go on, and the row's slot is free."""
    case = cases_of("shapes")[0]
    plain = (c for c in cases_of("shapes") if not {"seed", "repetition_penalty"} & c.keys() and c["num_boxes"] > 1)
    neighbour = next(c for c in plain if c["case"] != case["case"])
    batch = Batch("shapes", [{**case, "generation_mode": "slow", "max_new_tokens": 500}, neighbour])
    settings = {name: batch.settings[name] for name in ("generation_mode", "max_new_tokens")}
    output = batch.model.generate(
        **batch.inputs, **settings, logits_processor=[Says(case["input_ids"], ENDLESS)], output_scores=True,
        stopping_criteria=[batch.model.degenerate_answer_criteria()], return_dict_in_generate=True,
    )  # fmt: skip
    new = output.sequences[:, batch.input_ids.shape[1] :]
    said = [ids[~scores.isnan()].tolist() for ids, scores in zip(new, output.token_log_probs, strict=True)]
    assert said == [START, neighbour["output_ids"]]
    assert int(output.row_forwards[0]) == len(START + 2 * ids_of(A))


def cut(case: dict) -> int | None:
    criterion = DegenerateAnswerCriteria(model_of("shapes-early").config.token_roles, times=2)
    ids = case["output_ids"]
    kept = (criterion.answer_to_keep(ids[:end]) for end in range(1, len(ids) + 1))
    return next((length for length in kept if length is not None), None)


def greedy(mode: str, *, repeats: bool) -> list[dict]:
    """Golden cases of the half-trained network that say a box twice at once, or never."""
    cases = (case for case in cases_of("shapes-early") if case["generation_mode"] == mode and "seed" not in case)
    return [case for case in cases if (cut(case) is not None) == repeats]


@pytest.mark.parametrize("mode", ["hybrid", "fast"])
def test_rows_end_before_their_first_repetition(mode):
    cases = greedy(mode, repeats=True)
    assert len(cases) >= 3
    batch = Batch("shapes-early", cases + greedy(mode, repeats=False)[:6])
    criterion = batch.model.degenerate_answer_criteria(times=2)
    output = batch.run(stopping_criteria=[criterion], output_scores=True)
    for row, case in enumerate(batch.cases):
        length = int((~output.token_log_probs[row].isnan()).sum())
        new = output.sequences[row, batch.input_ids.shape[1] :]
        assert new[:length].tolist() == case["output_ids"][: cut(case)]
        assert (new[length:] == batch.model.config.pad_token_id).all()
        assert (output.accepted_by[row] >= 0).sum() == length
        assert output.row_forwards[row] < case["forward_step"] or cut(case) is None


def test_the_stock_call_gives_the_cut_text_and_its_history():
    case = greedy("hybrid", repeats=True)[0]
    heard: list[int] = []
    listener = SimpleNamespace(put=lambda tokens: heard.extend(tokens.flatten().tolist()), end=lambda: None)
    batch, tokenizer = Batch("shapes-early", [case]), tokenizer_of("shapes")
    text, history, statistics = batch.model.generate(
        **batch.inputs, tokenizer=tokenizer, verbose=True, streamer=listener,
        stopping_criteria=[batch.model.degenerate_answer_criteria(times=2)],
    )  # fmt: skip
    assert text == tokenizer.decode(case["output_ids"][: cut(case)])
    assert "".join(piece for _, piece in history) == text and all(piece for _, piece in history)
    assert f"num_tokens={cut(case)};" in statistics
    # a step that completes a repetition adds nothing; what earlier steps said has been heard
    said = case["input_ids"] + case["output_ids"]
    assert said[: len(heard)] == heard and len(heard) >= len(case["input_ids"]) + cut(case)


@pytest.mark.parametrize("use_cache", [False, True])
def test_transformers_own_generate_is_slow_and_takes_the_criterion(use_cache):
    """On the plain model; the checkpoint's config leaves the cache off. Rows end, what they said stays."""
    model = LocateAnythingForConditionalGeneration.from_pretrained(CHECKPOINTS["shapes"]).eval()
    slow = (case for case in cases_of("shapes") if case["generation_mode"] == "slow" and "seed" not in case)
    case = next(case for case in slow if case["num_tokens"] > 8 and "repetition_penalty" not in case)
    inputs, prompt = Batch("shapes", [case]).inputs, case["input_ids"]
    call = {"do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
    output = model.generate(**inputs, **call, max_new_tokens=case["max_new_tokens"])
    assert output[0, len(prompt) :].tolist() == case["output_ids"]
    criterion = DegenerateAnswerCriteria(model.config.token_roles, prompt_length=len(prompt))
    listed = {"logits_processor": [Says(prompt, ENDLESS)], "stopping_criteria": [criterion]}
    answer = model.generate(**inputs, **call, **listed, max_new_tokens=60)[0, len(prompt) :]
    assert answer.tolist() == START + 2 * ids_of(A)
    assert criterion.answer_to_keep(answer) == len(START)
