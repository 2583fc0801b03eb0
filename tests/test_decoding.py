"""The decoding rules without a model: every line of the tables in decoding.md §3–5."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locateanything.configuration import TokenRoles
from locateanything.decoding import accept_next, accept_window, draw, stock_warpers, window_tokens

BOX, END_BOX, REF, END_REF, NONE, NULL, MASK, END, IMAGE = range(100, 109)
ROLES = TokenRoles(
    image=IMAGE, box_start=BOX, box_end=END_BOX, coord_start=200, coord_end=1200, ref_start=REF, ref_end=END_REF,
    none=NONE, null=NULL, mask=MASK, end=END,
)  # fmt: skip
VOCABULARY = 1300
WORDS = (1, 2, 3, 4, 5, 6, 7)


def coordinate(value: int) -> int:
    return ROLES.coord_start + value


def distribution(mass: dict[int, float]) -> torch.Tensor:
    """`[V]`: the given masses, the rest thin over the remaining words."""
    p = torch.zeros(VOCABULARY)
    rest = [token for token in range(90) if token not in mass]
    p[rest] = (1 - sum(mass.values())) / len(rest)
    for token, share in mass.items():
        p[token] = share
    return p


def tokens_of(*slots: dict[int, float], hybrid: bool = False, candidates=WORDS[:6]) -> list[int]:
    p = torch.stack([distribution(slot) for slot in slots]).unsqueeze(0)
    return window_tokens(p, torch.tensor([list(candidates)]), torch.tensor([hybrid]), ROLES)[0].tolist()


def a_box(*values: int, sure: float = 0.95, end: dict[int, float] | None = None) -> list[dict[int, float]]:
    return [{BOX: 0.9}, *({coordinate(v): sure} for v in values), end or {END_BOX: 0.9}]


EMPTY = [{BOX: 0.71}, {NONE: 0.21}, {END_BOX: 0.21}, {NULL: 0.11}, {NULL: 0.11}, {3: 0.9}]


def test_case_a_empty_box():
    assert tokens_of(*EMPTY) == [BOX, NONE, END_BOX, NULL, NULL, NULL]


@pytest.mark.parametrize(
    ("slot", "mass"),
    [(0, {BOX: 0.69}), (1, {NONE: 0.19}), (2, {END_BOX: 0.19}), (3, {NULL: 0.09}), (4, {NULL: 0.09})],
)
def test_case_a_needs_every_slot(slot, mass):
    slots = list(EMPTY)
    slots[slot] = mass
    assert tokens_of(*slots) == list(WORDS[:6])


def test_case_a_bounds_are_closed_for_the_box_and_open_elsewhere():
    slots = [{BOX: 0.7}, {NONE: 0.5}, {END_BOX: 0.5}, {NULL: 0.5}, {NULL: 0.5}, {}]
    assert tokens_of(*slots)[:2] == [BOX, NONE]
    for slot, edge in ((1, {NONE: 0.2}), (2, {END_BOX: 0.2}), (3, {NULL: 0.1}), (4, {NULL: 0.1})):
        at_the_edge = list(slots)
        at_the_edge[slot] = edge
        assert tokens_of(*at_the_edge) == list(WORDS[:6])


def test_case_a_comes_before_b():
    slots = [{BOX: 0.9}, {NONE: 0.5, coordinate(1): 0.2}, {END_BOX: 0.5, coordinate(2): 0.2}]
    slots += [{NULL: 0.5, coordinate(3): 0.2}, {NULL: 0.5, coordinate(4): 0.2}, {END_BOX: 0.9}]
    assert tokens_of(*slots) == [BOX, NONE, END_BOX, NULL, NULL, NULL]


def test_case_b_box_asks_nothing_of_slot_0():
    slots = a_box(1, 20, 300, 1000)
    slots[0] = {5: 0.99}
    assert tokens_of(*slots) == [BOX, *map(coordinate, (1, 20, 300, 1000)), END_BOX]


@pytest.mark.parametrize(
    ("end", "holds"),
    [
        ({END_BOX: 0.2}, True),
        ({NULL: 0.21}, True),
        ({END: 0.21}, True),
        ({END_BOX: 0.07, NULL: 0.07, END: 0.07}, True),
        ({END_BOX: 0.06, NULL: 0.06, END: 0.06}, False),
    ],
)
def test_case_b_end_mass(end, holds):
    assert (tokens_of(*a_box(1, 2, 3, 4, end=end))[0] == BOX) == holds


def test_case_b_takes_the_most_probable_coordinate_of_the_top_four():
    slots = a_box(1, 2, 3, 4)
    slots[2] = {1: 0.4, 2: 0.25, coordinate(500): 0.2, coordinate(510): 0.1}
    assert tokens_of(*slots)[2] == coordinate(500)
    slots[2] = {1: 0.3, 2: 0.25, 3: 0.2, 4: 0.15, coordinate(500): 0.09}
    assert tokens_of(*slots) == list(WORDS[:6]), "a coordinate in fifth place is none"


@pytest.mark.parametrize(
    ("masses", "hybrid", "ambiguous"),
    [
        ({100: 0.6, 161: 0.3}, True, True),
        ({100: 0.6, 160: 0.3}, True, False),  # 60 apart is not more than 60
        ({100: 0.6, 161: 0.3}, False, False),  # fast takes it
        ({100: 0.9, 161: 0.09}, True, False),  # 0.9 is sure
        ({100: 0.89, 161: 0.1}, True, True),
        ({100: 0.6}, True, False),  # one candidate only
        ({100: 0.5, 130: 0.2, 161: 0.1}, True, True),  # the ends count
    ],
)
def test_hybrid_voids_ambiguous_coordinates(masses, hybrid, ambiguous):
    slots = a_box(1, 2, 3, 4)
    slots[3] = {coordinate(value): share for value, share in masses.items()}
    assert tokens_of(*slots, hybrid=hybrid)[3] == (0 if ambiguous else coordinate(100))


LABEL = [{REF: 0.6}, {1: 0.9}, {2: 0.9}, {3: 0.9}, {END_REF: 0.9}, {NULL: 0.9}]


def test_case_c_label():
    assert tokens_of(*LABEL, candidates=[9] * 6) == [REF, 1, 2, 3, END_REF, NULL]
    assert tokens_of({REF: 0.59}, *LABEL[1:], candidates=[9] * 6) == [9] * 6


def test_case_c_skips_coordinates():
    slots = list(LABEL)
    slots[2] = {coordinate(1): 0.4, coordinate(2): 0.3, 8: 0.2}
    assert tokens_of(*slots, candidates=[9] * 6)[2] == 8
    slots[2] = {coordinate(i): 0.19 for i in range(5)}
    assert tokens_of(*slots, candidates=[9] * 6) == [9] * 6, "five coordinates leave no word in the top five"


def test_case_d_takes_the_candidates():
    assert tokens_of(*[{1: 0.5}] * 6, candidates=[11, 12, 13, 14, 15, 16]) == [11, 12, 13, 14, 15, 16]


def test_rows_do_not_mix():
    p = torch.stack([torch.stack([distribution(s) for s in slots]) for slots in (EMPTY, a_box(1, 2, 3, 4), LABEL)])
    tokens = window_tokens(p, torch.full((3, 6), 9), torch.tensor([True, False, True]), ROLES)
    assert tokens[:, 0].tolist() == [BOX, BOX, REF]
    assert tokens[0, 1] == NONE and tokens[1, 1] == coordinate(1)


C = [coordinate(value) for value in (10, 20, 30, 40, 50)]


@pytest.mark.parametrize(
    ("tokens", "accepted", "then"),
    [
        # the row ends
        ([NULL, 1, 2, 3, 4, 5], [END], "finished"),
        ([END, 1, 2, 3, 4, 5], [END], "finished"),
        # nothing found
        ([BOX, NONE, END_BOX, NULL, NULL, NULL], [BOX, NONE, END_BOX], "mtp"),
        ([BOX, NONE, 7, 8, 9, END], [BOX, NONE, END_BOX], "mtp"),
        # a box
        ([BOX, *C[:4], END_BOX], [BOX, *C[:4], END_BOX], "mtp"),
        # a point, whatever follows
        ([BOX, *C[:2], END_BOX, NULL, NULL], [BOX, *C[:2], END_BOX], "mtp"),
        ([BOX, *C[:2], END_BOX, END, 5], [BOX, *C[:2], END_BOX], "mtp"),
        # a broken box
        ([BOX, C[0], 0, C[2], C[3], END_BOX], [BOX, C[0]], "broken"),
        ([BOX, 0, C[1], C[2], C[3], END_BOX], [BOX], "broken"),
        ([BOX, *C[:4], 7], [BOX, *C[:4]], "broken"),
        ([BOX, *C], [BOX, *C[:4]], "broken"),
        ([BOX, *C[:3], END_BOX, NULL], [BOX, *C[:3]], "broken"),
        ([BOX, C[0], END_BOX, NULL, NULL, NULL], [BOX, C[0]], "broken"),
        ([BOX, NULL, 1, 2, 3, 4], [BOX], "broken"),
        # anything else, up to the first null
        ([REF, 1, 2, END_REF, NULL, NULL], [REF, 1, 2, END_REF], "mtp"),
        ([REF, 1, 2, 3, 4, 5], [REF, 1, 2, 3, 4, 5], "mtp"),
        ([1, NULL, 2, 3, 4, 5], [1], "mtp"),
        ([1, 2, END, 3, 4, 5], [1, 2, END, 3, 4, 5], "mtp"),  # an end inside does not end the row
        ([C[0], C[1], END_BOX, NULL, NULL, NULL], [C[0], C[1], END_BOX], "mtp"),
        # twice closed
        ([REF, 1, END_REF, END_REF, NULL, NULL], [REF, 1, END_REF], "mtp"),
        ([REF, 1, 2, 3, END_REF, END_REF], [REF, 1, 2, 3, END_REF], "mtp"),
        ([END_REF, END_REF, NULL, 1, 2, 3], [END_REF], "mtp"),
        ([END_REF, NULL, END_REF, END_REF, 2, 3], [END_REF], "mtp"),
        ([REF, END_REF, END_REF, 4, NULL, NULL], [REF, END_REF, END_REF, 4], "mtp"),
    ],
)
@pytest.mark.parametrize("hybrid", [True, False])
def test_what_a_window_accepts(tokens, accepted, then, hybrid):
    # beside other rows, which must not matter
    batch = torch.tensor([[END, 1, 2, 3, 4, 5], tokens, [BOX, *C[:4], END_BOX]])
    result = accept_window(batch, torch.tensor([not hybrid, hybrid, hybrid]), ROLES)
    got = result.tokens[1, : result.lengths[1]].tolist()
    if then == "broken" and not hybrid:
        accepted, then = tokens, "mtp"
    assert got == accepted
    assert result.finished[1].item() == (then == "finished")
    assert result.autoregressive[1].item() == (then == "broken")


@pytest.mark.parametrize(
    ("token", "hybrid", "autoregressive", "finished"),
    [
        (END_BOX, True, False, False),
        (C[0], True, True, False),
        (NONE, True, True, False),
        (7, True, True, True),
        (END, True, True, True),
        (BOX, True, True, True),
        (NULL, True, True, True),
        (END, False, True, True),
        (END_BOX, False, True, False),
        (7, False, True, False),
        (NULL, False, True, False),
    ],
)
def test_what_follows_a_next_token(token, hybrid, autoregressive, finished):
    result = accept_next(torch.tensor([token]), torch.tensor([hybrid]), ROLES)
    assert result.tokens[0, 0] == token and result.lengths[0] == 1
    assert result.autoregressive[0].item() == autoregressive
    assert result.finished[0].item() == finished


@given(
    tokens=st.lists(st.sampled_from([BOX, END_BOX, REF, END_REF, NONE, NULL, END, 1, 2, *C]), min_size=6, max_size=6)
)
def test_any_window_accepts_one_to_six_of_its_tokens(tokens):
    for hybrid in (True, False):
        result = accept_window(torch.tensor([tokens]), torch.tensor([hybrid]), ROLES)
        count = int(result.lengths[0])
        assert 1 <= count <= 6
        allowed = {*tokens, END, END_BOX}
        assert set(result.tokens[0, :count].tolist()) <= allowed
        assert not (result.finished[0] and result.autoregressive[0])


# ---- logits to probabilities


def warped(logits: list[float], ids=(0,), **recipe) -> torch.Tensor:
    recipe = {"repetition_penalty": 1.0, "temperature": 0.0, "top_p": None, "top_k": None, **recipe}
    return stock_warpers(**recipe)(torch.tensor([ids]), torch.tensor([logits]))[0]


def test_the_penalty_divides_positive_and_multiplies_the_rest():
    assert warped([2.0, -2.0, 2.0, 0.0], ids=(0, 1, 3, 3), repetition_penalty=2.0).tolist() == [1.0, -4.0, 2.0, 0.0]


def test_top_p_keeps_the_token_that_crosses_and_one_that_meets_it():
    logits = [math.log(share) for share in (0.5, 0.25, 0.125, 0.125)]
    kept = [x > -math.inf for x in warped(logits, top_p=0.6).tolist()]
    assert kept == [True, True, False, False]
    # preceding mass equal to top_p is not more than top_p: transformers' own warper would drop the second
    assert [x > -math.inf for x in warped(logits, top_p=0.5).tolist()] == [True, True, False, False]
    assert [x > -math.inf for x in warped(logits, top_p=0.0).tolist()] == [True, False, False, False]


def test_the_order_is_penalty_temperature_top_p_top_k():
    logits, ids = [3.0, 2.5, 2.0, 1.0, -1.0], (0, 4)
    recipe = {"repetition_penalty": 1.5, "temperature": 0.5, "top_p": 0.9, "top_k": 2}
    penalised = torch.tensor([2.0, 2.5, 2.0, 1.0, -1.5]) / 0.5
    assert warped(logits, ids, **recipe).tolist() == [4.0, 5.0, 4.0, -math.inf, -math.inf]
    assert penalised.softmax(0)[[1, 0]].sum() < 0.9  # so top_p alone would have kept three


def test_temperature_zero_changes_nothing():
    assert warped([1.0, 2.0]).tolist() == [1.0, 2.0]


def test_a_draw_is_categoricals():
    p = torch.rand(3, 6, 50).softmax(-1)
    torch.manual_seed(3)
    expected = torch.distributions.Categorical(probs=p).sample()
    assert torch.equal(draw(p, torch.Generator().manual_seed(3)), expected)
