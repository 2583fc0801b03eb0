"""The decoding rules without a model: every line of the tables in docs/stock-behaviour.md §3–5."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locateanything.configuration import TokenRoles
from locateanything.decoding import (
    Acceptance,
    Phase,
    StockTopPLogitsWarper,
    accept_either,
    accept_next,
    accept_window,
    draw,
    leave_label,
    stock_warpers,
    verify,
    verify_label,
    window_tokens,
)

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
        ({100: 0.5, 130: 0.2, 1050: 0.1}, True, False),  # a token behind the last coordinate does not
        ({100: 0.5, 130: 0.2, -150: 0.1}, True, False),  # nor does one before the first
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


def below(share: float) -> float:
    """The next smaller float32 probability."""
    return float(torch.nextafter(torch.tensor(share), torch.tensor(0.0)))


def above(share: float) -> float:
    return float(torch.nextafter(torch.tensor(share), torch.tensor(1.0)))


@pytest.mark.parametrize(
    ("slots", "slot", "token", "least", "first"),
    [
        (EMPTY, 0, BOX, 0.7, BOX),
        (EMPTY, 1, NONE, above(0.2), BOX),
        (EMPTY, 2, END_BOX, above(0.2), BOX),
        (EMPTY, 3, NULL, above(0.1), BOX),
        (EMPTY, 4, NULL, above(0.1), BOX),
        (a_box(1, 2, 3, 4), 5, END_BOX, 0.2, BOX),
        (a_box(1, 2, 3, 4), 5, NULL, 0.2, BOX),
        (a_box(1, 2, 3, 4), 5, END, 0.2, BOX),
        (LABEL, 0, REF, 0.6, REF),
    ],
)
def test_a_threshold_is_this_very_number(slots, slot, token, least, first):
    for share, holds in ((least, True), (below(least), False)):
        at_the_edge = list(slots)
        at_the_edge[slot] = {token: share}
        assert tokens_of(*at_the_edge)[0] == (first if holds else WORDS[0])


def test_a_coordinate_is_sure_from_this_very_number():
    for share, sure in ((0.9, True), (below(0.9), False)):
        slots = a_box(1, 2, 3, 4)
        slots[3] = {coordinate(100): share, coordinate(200): 0.05}
        assert tokens_of(*slots, hybrid=True)[3] == (coordinate(100) if sure else 0)


def test_the_last_places_of_the_top_count():
    slots = a_box(1, 2, 3, 4)
    slots[2] = {1: 0.3, 2: 0.25, 3: 0.2, coordinate(500): 0.15}
    assert tokens_of(*slots)[2] == coordinate(500)
    slots = list(LABEL)
    slots[2] = {coordinate(1): 0.25, coordinate(2): 0.2, coordinate(3): 0.15, coordinate(4): 0.12, 8: 0.1}
    assert tokens_of(*slots, candidates=[9] * 6)[2] == 8


def test_the_first_and_the_last_coordinate_are_coordinates_and_their_neighbours_are_not():
    assert tokens_of(*a_box(0, 1000, 0, 1000))[1:5] == [ROLES.coord_start, ROLES.coord_end] * 2
    for outside in (-1, 1001):
        assert tokens_of(*a_box(1, outside, 3, 4)) == list(WORDS[:6])


@pytest.mark.parametrize("slot", range(1, 5))
def test_one_ambiguous_coordinate_is_voided_alone(slot):
    slots = a_box(1, 2, 3, 4)
    slots[slot] = {7: 0.4, coordinate(900): 0.3, coordinate(100): 0.2}
    expected = [BOX, *map(coordinate, (1, 2, 3, 4)), END_BOX]
    expected[slot] = 0
    assert tokens_of(*slots, hybrid=True) == expected


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
    assert result.phase[1] == (Phase.AR if then == "broken" else Phase.MTP)


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
    assert result.phase[0] == (Phase.AR if autoregressive else Phase.MTP)
    assert result.finished[0].item() == finished


def window_by_hand(tokens: list[int], hybrid: bool) -> tuple[list[int], str]:
    """docs/stock-behaviour.md §4, line by line: (accepted, then)."""
    coordinates = [ROLES.coord_start <= token <= ROLES.coord_end for token in tokens]
    if tokens[0] in (NULL, END):
        return [END], "finished"
    if tokens[0] == BOX:
        if tokens[1] == NONE:
            return [BOX, NONE, END_BOX], "mtp"
        if all(coordinates[1:5]) and tokens[5] == END_BOX:
            return tokens, "mtp"
        if coordinates[1:4] == [True, True, False] and tokens[3] == END_BOX:
            return tokens[:4], "mtp"
        if not hybrid:
            return tokens, "mtp"
        leading = [*coordinates[1:5], False].index(False)
        return tokens[: 1 + leading], "broken"
    accepted = list(itertools.takewhile(lambda token: token != NULL, tokens))
    return accepted[:-1] if accepted[-2:] == [END_REF, END_REF] else accepted, "mtp"


def test_every_window_of_every_kind_of_token():
    """All that §4 tells apart, in each of the six slots; tokens it does not tell apart take turns."""
    coordinates = itertools.cycle([ROLES.coord_start, ROLES.coord_end, *C])
    others = itertools.cycle([1, ROLES.coord_start - 1, REF, BOX, END, ROLES.coord_end + 1, MASK])
    behind = (END_BOX, END_REF, NONE, NULL, coordinates, others)
    firsts = (BOX, NULL, END_REF, others)
    windows = [
        [token if isinstance(token, int) else next(token) for token in window]
        for window in itertools.product(firsts, *[behind] * 5)
    ]
    tokens = torch.tensor(windows)
    for hybrid in (True, False):
        result = accept_window(tokens, torch.full((len(windows),), hybrid), ROLES)
        rows = zip(windows, *(each.tolist() for each in result), strict=True)
        for window, accepted, length, drafted, phase, finished in rows:
            expected, then = window_by_hand(window, hybrid)
            assert accepted[:length] == expected, window
            assert (phase, finished) == (Phase.AR if then == "broken" else Phase.MTP, then == "finished"), window
            assert not drafted
    assert tokens.tolist() == windows, "the tokens are the caller's"


def test_what_follows_any_next_token():
    tokens = [*range(90, 110), *range(ROLES.coord_start - 2, ROLES.coord_end + 3)]
    for hybrid in (True, False):
        result = accept_next(torch.tensor(tokens), torch.full((len(tokens),), hybrid), ROLES)
        assert result.tokens.tolist() == [[token] for token in tokens]
        assert result.lengths.tolist() == [1] * len(tokens) and not result.drafted.any()
        goes_on = {END_BOX, NONE, *range(ROLES.coord_start, ROLES.coord_end + 1)} if hybrid else {*tokens} - {END}
        assert result.finished.tolist() == [token not in goes_on for token in tokens]
        windows = [hybrid and token == END_BOX for token in tokens]
        assert result.phase.tolist() == [Phase.MTP if window else Phase.AR for window in windows]


def test_either_rule_is_the_one_of_the_rows_phase():
    generator = torch.Generator().manual_seed(1)
    kinds = torch.tensor([BOX, END_BOX, REF, END_REF, NONE, NULL, END, 5, coordinate(1), coordinate(900)])
    p = torch.rand(400, 6, VOCABULARY, generator=generator) * 0.001
    p.scatter_(2, kinds[torch.randint(len(kinds), (400, 6, 1), generator=generator)], 1.0)
    p, tokens = p / p.sum(-1, keepdim=True), p.argmax(-1)
    alone, hybrid = torch.rand(2, 400, generator=generator) < 0.5
    either = accept_either(p, tokens, alone, hybrid, ROLES)
    window = accept_window(window_tokens(p, tokens, hybrid, ROLES), hybrid, ROLES)
    following = accept_next(tokens[:, 0], hybrid, ROLES)
    for row in range(400):
        rule = following if alone[row] else window
        length = int(rule.lengths[row])
        assert either.tokens[row, :length].tolist() == rule.tokens[row, :length].tolist()
        assert [part[row] for part in either[1:]] == [part[row] for part in rule[1:]]


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
        assert not (result.finished[0] and result.phase[0] == Phase.AR)


def test_phases_are_the_numbers_of_accepted_by():
    assert {phase.name: phase.value for phase in Phase} == {"MTP": 0, "AR": 1, "VERIFIED": 2}


# ---- drafts, where random rows (tests/test_verified.py) seldom come


def verified(
    chosen: list[int], draft: list[int], drafted: int, window: list[int], most: int = 6
) -> tuple[list[int], list[int], bool]:
    """(accepted, next draft, finished) of one row."""
    result = verify(*(torch.tensor([each]) for each in (chosen, draft, drafted, window, most)), ROLES)
    assert result.tokens.shape == (1, 11) and result.drafted >= 0 and result.phase == Phase.VERIFIED
    length, end = int(result.lengths), int(result.lengths + result.drafted)
    return result.tokens[0, :length].tolist(), result.tokens[0, length:end].tolist(), bool(result.finished)


def test_what_stands_behind_a_draft_is_no_draft():
    assert verified([1, 2, 3], [1, 2], 0, [1, 7, NULL, 4, 4, 4]) == ([1], [7], False)
    assert verified([1, 2, 3], [1, 2], 1, [2, 7, NULL, 4, 4, 4]) == ([1, 2], [7], False)


def test_behind_a_wrong_coordinate_the_next_one_alone_is_said_anew():
    chosen = [BOX, C[4], C[3], C[3], C[3]]
    assert verified(chosen, [BOX, *C[:3]], 4, [1] * 6) == ([BOX, C[4]], [C[3], C[2]], False)
    assert verified(chosen, [BOX, C[0], END_BOX, C[2]], 4, [1] * 6) == ([BOX, C[4]], [END_BOX, C[2]], False)


def test_no_draft_is_a_draft_of_none():
    assert verified([1, 2], [1], 1, [3] * 6) == ([1, 2], [], False)
    assert verified([1, END], [1], 1, [END, 2, 2, 2, 2, 2]) == ([1, END], [], True)
    assert verified([END, 2, 3], [1, 2], 2, [3] * 6) == ([END], [], True)


def acceptance(rows: list[list[int]], lengths: list[int], finished: list[bool], drafted: list[int]) -> Acceptance:
    phase = torch.where(torch.tensor(finished), Phase.MTP, Phase.VERIFIED)
    return Acceptance(*map(torch.tensor, (rows, lengths, drafted)), phase, torch.tensor(finished))


def test_what_passes_a_limit_is_taken_back_with_its_end_and_its_draft():
    for most in (3, 6):
        assert verified([1, 2, END], [1, 2], 2, [3] * 6, most) == ([1, 2, END], [], True)
        assert verified([1, 2, 3], [1, 2], 2, [3, 4, NULL, 5, 5, 5], most) == ([1, 2, 3], [4], False)
    assert verified([1, 2, END], [1, 2], 2, [3] * 6, 2) == ([1, 2], [], False)
    assert verified([1, 2, 3], [1, 2], 2, [3, 4, NULL, 5, 5, 5], 1) == ([1], [], False)
    assert verified([1, 7, 3, 3], [1, 2, 3], 3, [3] * 6, 1) == ([1], [], False)


def test_a_label_opens_only_where_it_is_accepted():
    window = acceptance([[1, 2, REF, 3, 4, 5]] * 2, [2, 3], [False, False], [0, 0])._replace(
        phase=torch.tensor([0, 0])
    )
    opened = verify_label(window, torch.tensor([True, True]), ROLES)
    assert opened.lengths.tolist() == [2, 3] and opened.phase.tolist() == [Phase.MTP, Phase.VERIFIED]


def test_behind_a_label_end_an_end_is_taken_back():
    rows = [[1, END_REF, END, 4, 5, 6], [1, 2, END, 4, 5, 6], [1, 2, END_REF, 4, 5, 6]]
    left = leave_label(acceptance(rows, [3, 3, 2], [True, True, False], [0, 0, 3]), torch.tensor([True] * 3), ROLES)
    assert left.lengths.tolist() == [2, 3, 2] and left.finished.tolist() == [False, True, False]
    assert left.phase.tolist() == [Phase.MTP, Phase.MTP, Phase.VERIFIED] and left.drafted.tolist() == [0, 0, 3]


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


def test_top_p_takes_the_last_axis_of_any_shape():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(2, 4, 3)
    kept = StockTopPLogitsWarper(0.6)(torch.zeros(2, 1, dtype=torch.long), logits).isfinite()
    assert kept.tolist() == [[[False, True, True]] * 4] * 2


def test_top_k_alone():
    assert warped([3.0, 1.0, 2.0], top_k=2).tolist() == [3.0, -math.inf, 2.0]


@pytest.mark.parametrize("number", [0.999, 1.001])
def test_a_penalty_or_temperature_close_to_one_counts(number):
    assert warped([2.0, 3.0], repetition_penalty=number)[0] == torch.tensor(2.0) / number
    assert warped([2.0, 3.0], temperature=number)[0] == torch.tensor(2.0) / number


def test_what_is_off_is_left_out():
    recipe = {"repetition_penalty": 1.0, "top_p": 1.0, "top_k": None}
    assert not stock_warpers(temperature=0.0, **recipe) and not stock_warpers(temperature=1.0, **recipe)


def test_a_users_processors_come_behind_the_penalty_and_before_the_temperature():
    recipe = {"repetition_penalty": 2.0, "temperature": 0.5, "between": [lambda ids, scores: scores + 1]}
    assert warped([4.0, 4.0], ids=(0,), **recipe).tolist() == [6.0, 10.0]


def test_temperature_zero_changes_nothing():
    assert warped([1.0, 2.0]).tolist() == [1.0, 2.0]


def test_a_draw_is_categoricals():
    p = (3 * torch.randn(3, 6, 50)).softmax(-1)
    torch.manual_seed(3)
    expected = torch.distributions.Categorical(probs=p).sample()
    noise = torch.empty_like(p).exponential_(generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(noise, p), expected)


def test_a_draw_heeds_no_scale():
    p, noise = torch.rand(5, 40), torch.rand(5, 40)
    assert torch.equal(draw(noise, p * 2.0**-100), draw(noise, p))
