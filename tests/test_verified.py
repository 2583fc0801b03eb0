"""Mode "verified": the answers of "slow", from drafts; and labels verified in "hybrid" and "fast"."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor

from locateanything.decoding import Acceptance, Phase, leave_label, verify, verify_label
from tests.conftest import Batch, cases_of, model_of, tokenizer_of
from tests.test_decoding import BOX, END, END_REF, NULL, REF, ROLES, C


@functools.cache
def slow_cases(name: str) -> list[dict]:
    return [case for case in cases_of(name) if case["generation_mode"] == "slow"]


# ---- the answers of next-token decoding


def test_each_row_alone_answers_as_slow_did_in_fewer_forwards(golden):
    """Sampled rows too: a generator gives a position the same noise."""
    forwards = slow = 0
    for case in slow_cases(golden):
        batch = Batch(golden, [case])
        output = batch.run(generation_mode="verified")
        assert batch.answers(output) == batch.expected(), case["case"]
        assert output.row_forwards[0] <= case["forward_step"]
        forwards, slow = forwards + int(output.row_forwards), slow + case["forward_step"]
    assert forwards < 0.6 * slow


def test_the_draft_saves_two_thirds_of_the_forwards_where_windows_are_right():
    right = {
        case["case"]: case["output_ids"]
        for case in cases_of("shapes")
        if case["generation_mode"] == "fast" and "seed" not in case and "repetition_penalty" not in case
    }
    cases = [
        case
        for case in slow_cases("shapes")
        if case["max_new_tokens"] == 256 and "seed" not in case and right.get(case["case"]) == case["output_ids"]
    ]
    batch = Batch("shapes", cases)
    output = batch.run(generation_mode="verified")
    assert len(cases) > 15 and output.row_forwards.sum() <= 0.31 * sum(case["forward_step"] for case in cases)


class Forbids(LogitsProcessor):
    """Forbids a token as the third one of an answer: it depends on the length of what is behind."""

    def __init__(self, token: int, prompt: int):
        self.token, self.prompt = token, prompt

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == 1
        if input_ids.shape[1] == self.prompt + 2:
            scores = scores.clone()
            scores[:, self.token] = -math.inf
        return scores


def test_processors_see_what_they_would_see_in_slow():
    for case in [case for case in slow_cases("shapes") if case["num_tokens"] > 20 and "seed" not in case][:6]:
        batch = Batch("shapes", [case])
        processor = [Forbids(case["output_ids"][2], len(case["input_ids"]))]
        slow = batch.run(logits_processor=processor).sequences
        assert torch.equal(batch.run(generation_mode="verified", logits_processor=processor).sequences, slow)
        assert slow[0, len(case["input_ids"]) + 2] != case["output_ids"][2]


class Counts(LogitsProcessor):
    """Keeps what it is asked, in order."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores):
        self.asked.append(input_ids[0].tolist())
        return scores


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_processors_are_asked_what_slow_asks_them(temperature):
    for case in [case for case in slow_cases("shapes") if case["num_tokens"] > 20][:8]:
        batch, asked = Batch("shapes", [case]), {}
        for mode in ("slow", "verified"):
            counts = Counts()
            batch.run(generation_mode=mode, temperature=temperature, logits_processor=[counts])
            asked[mode] = counts.asked
        assert asked["verified"] == asked["slow"]


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_answers_can_be_constrained_as_in_slow(temperature):
    case = next(case for case in slow_cases("shapes") if case["num_tokens"] > 20 and "seed" not in case)
    texts = "<ref>red circle</ref><box><0><0><1><1></box><|im_end|>", "<ref>blue square</ref><box>none</box><|im_end|>"
    answers = [tokenizer_of("shapes").encode(text) for text in texts]

    def allowed(_, ids):
        said = ids[len(case["input_ids"]) :].tolist()
        return sorted({a[len(said)] for a in answers if a[: len(said)] == said and len(a) > len(said)})

    batch = Batch("shapes", [case])
    settings = {"prefix_allowed_tokens_fn": allowed, "temperature": temperature, "max_new_tokens": 40}
    slow = batch.run(**settings).sequences
    assert slow[0, len(case["input_ids"]) :].tolist() in answers
    assert torch.equal(batch.run(generation_mode="verified", **settings).sequences, slow)


@pytest.mark.parametrize("least", range(4, 32, 7))
def test_a_least_length_is_kept_as_in_slow(least):
    cases = [case for case in slow_cases("shapes") if "seed" not in case][:12]
    batch = Batch("shapes", cases)
    slow = batch.run(min_new_tokens=least).sequences
    assert torch.equal(batch.run(generation_mode="verified", min_new_tokens=least).sequences, slow)


@pytest.mark.parametrize("options", [{"min_new_tokens": 40}, {"no_repeat_ngram_size": 3}, {"eos_token_id": 28}])
def test_transformers_options_work_as_in_slow(options):
    cases = [case for case in slow_cases("shapes") if "seed" not in case][:12]
    batch = Batch("shapes", cases)
    slow = batch.run(**options).sequences
    assert torch.equal(batch.run(generation_mode="verified", **options).sequences, slow)


@pytest.mark.parametrize("new", range(1, 14, 3))
def test_a_limit_cuts_where_slow_would(new):
    cases = [case for case in slow_cases("shapes") if case["num_tokens"] > 20 and "seed" not in case][:8]
    batch = Batch("shapes", cases)
    slow = batch.run(max_new_tokens=new).sequences
    assert slow.shape[1] == batch.input_ids.shape[1] + new
    assert torch.equal(batch.run(generation_mode="verified", max_new_tokens=new).sequences, slow)


def test_out_of_memory_loses_no_token(monkeypatch):
    from locateanything.modeling_locateanything_batched import LocateAnythingBatchedForConditionalGeneration as Model

    decode, calls = Model.decode, []

    def scarce(self, *args):
        calls.append(None)
        if len(calls) in (5, 9):
            raise torch.OutOfMemoryError("injected")
        return decode(self, *args)

    monkeypatch.setattr(Model, "decode", scarce)
    batch = Batch("shapes", slow_cases("shapes")[:12])
    assert batch.answers(batch.run(generation_mode="verified")) == batch.expected()


# ---- sampling


@pytest.mark.slow
def test_samples_follow_next_token_decodings_distribution():
    """A chi-squared test of 4000 answers of three tokens, some accepted from drafts and some not.

    Were the distribution right, it would fail for one seed in a million; a draft accepted unseen fails it by far.
    """
    case = next(case for case in slow_cases("shapes") if case["num_tokens"] > 20 and "seed" not in case)
    rows, temperature = 4000, 2.5
    answer = case["output_ids"]  # the label is given, so that coordinates are drawn
    label = answer[: answer.index(ROLES_OF_SHAPES.ref_end) + 1]
    batch = Batch("shapes", [{**case, "input_ids": case["input_ids"] + label}])
    torch.manual_seed(0)
    sampled = batch.model.generate(
        **batch.inputs,
        generation_mode="verified",
        temperature=temperature,
        max_new_tokens=3,
        num_return_sequences=rows,
        max_batch_rows=64,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert sampled.row_forwards.min() < 3, "no draft was ever accepted"
    assert sampled.row_forwards.max() == 3, "every draft was accepted"
    seen: dict[tuple[int, ...], int] = {}
    for ids in sampled.sequences[:, batch.input_ids.shape[1] :].tolist():
        ids = ids[: ids.index(ROLES_OF_SHAPES.end) + 1] if ROLES_OF_SHAPES.end in ids else ids
        seen[tuple(ids)] = seen.get(tuple(ids), 0) + 1

    expected = {
        ids: rows * p for ids, p in joint(batch, temperature, depth=3, least=8 / rows).items() if rows * p >= 8
    }
    pairs = [(seen.get(ids, 0), count) for ids, count in expected.items()]
    pairs.append((rows - sum(count for count, _ in pairs), rows - sum(expected.values())))
    assert len(pairs) > 20
    chi_squared = sum((count - mean) ** 2 / mean for count, mean in pairs)
    freedom = len(pairs) - 1
    # Wilson and Hilferty: the cube root of chi² / k is nearly normal; 4.753 is exceeded once in a million
    z = ((chi_squared / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.753, (chi_squared, freedom)


ROLES_OF_SHAPES = model_of("shapes").config.token_roles


def joint(batch: Batch, temperature: float, depth: int, least: float) -> dict[tuple[int, ...], float]:
    """Probabilities of answers of `depth` tokens, by plain forward passes; branches below `least` are left out."""
    known, leaves = {(): 1.0}, {}
    features = batch.model.extract_feature(batch.inputs["pixel_values"], batch.inputs["image_grid_hws"])
    for _ in range(depth):
        longer = {}
        for ids, p in known.items():
            input_ids = torch.cat([batch.input_ids[0], torch.tensor(ids, dtype=torch.long)])[None]
            with torch.no_grad():
                logits = batch.model(input_ids=input_ids, visual_features=features).logits[0, -1].double()
            for token, share in enumerate((logits / temperature).softmax(-1).tolist()):
                if p * share >= least:
                    ends = token == ROLES_OF_SHAPES.end
                    (leaves if ends else longer)[(*ids, token)] = p * share
        known = longer
    return {**leaves, **known}


# ---- the rule

TOKENS = st.sampled_from([BOX, REF, END_REF, END, NULL, 1, 2, *C[:3]])


def by_hand(chosen: list[int], draft: list[int], window: list[int]) -> tuple[list[int], list[int], bool]:
    """(accepted, next draft, finished) of one row, token by token."""
    accepted: list[int] = []
    for own, said in zip(chosen, [*draft, None], strict=True):
        accepted.append(own)
        if own == END:
            return accepted, [], True
        if own != said:
            break
    if len(accepted) == len(draft) + 1:
        if accepted[-1] != window[0]:
            return accepted, [], False
        following: list[int] = []
        for before, token in pairwise(window):
            if token == NULL or before == END:
                break
            following.append(token)
        return accepted, following, False
    rest = draft[len(accepted) :]
    anew = chosen[len(accepted)]
    if rest and all(ROLES.coord_start <= token <= ROLES.coord_end for token in (rest[0], anew)):
        rest = [anew, *rest[1:]]
    return accepted, rest, False


@given(
    rows=st.lists(
        st.tuples(
            st.lists(TOKENS, max_size=5),
            st.lists(TOKENS, min_size=6, max_size=6),
            st.lists(TOKENS, min_size=6, max_size=6),
            st.integers(0, 6),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_rule_is_the_rule_token_by_token(rows):
    cases = []
    for draft, choices, window, agree, follows in rows:
        chosen = [*draft[:agree], *choices[len(draft[:agree]) :]]  # so that drafts hold for a while
        if follows:
            window = [chosen[len(draft)], *window[1:]]
        cases.append((chosen, draft, window))
    width = 1 + max(len(draft) for _, draft, _ in cases)
    result = verify(
        torch.tensor([chosen[:width] for chosen, *_ in cases]),
        torch.tensor([(draft + [END] * 5)[: width - 1] for _, draft, _ in cases], dtype=torch.long),
        torch.tensor([len(draft) for _, draft, _ in cases]),
        torch.tensor([window for *_, window in cases]),
        torch.full((len(cases),), 6),
        ROLES,
    )
    for row, (chosen, draft, window) in enumerate(cases):
        accepted, following, finished = by_hand(chosen[: len(draft) + 1], draft, window)
        length, drafted = int(result.lengths[row]), int(result.drafted[row])
        assert result.tokens[row, :length].tolist() == accepted
        assert result.tokens[row, length : length + drafted].tolist() == following
        assert bool(result.finished[row]) == finished
        assert result.phase[row] == Phase.VERIFIED


# ---- labels


def accepted_of(tokens: list[int], length: int, verified: bool = False, drafted: int = 0) -> Acceptance:
    phase = Phase.VERIFIED if verified else Phase.MTP
    return Acceptance(*(torch.tensor([each]) for each in (tokens, length, drafted, phase, False)))


def test_behind_a_label_opening_a_window_is_a_draft():
    window = accepted_of([REF, 1, 2, END_REF, NULL, NULL], 4)
    opened = verify_label(window, torch.tensor([True]), ROLES)
    assert (opened.lengths, opened.drafted, opened.phase) == (1, 3, Phase.VERIFIED)
    left = verify_label(window, torch.tensor([False]), ROLES)
    assert (left.lengths, left.drafted, left.phase) == (4, 0, Phase.MTP)
    inside = verify_label(accepted_of([1, 2, REF, 3, NULL, NULL], 4), torch.tensor([True]), ROLES)
    assert (inside.lengths, inside.drafted, inside.phase) == (3, 1, Phase.VERIFIED)
    behind = verify_label(accepted_of([1, 2, NULL, REF, 3, NULL], 2), torch.tensor([True]), ROLES)
    assert (behind.lengths, behind.drafted, behind.phase) == (2, 0, Phase.MTP)


def test_behind_a_label_end_come_windows_again():
    step = accepted_of([1, 2, END_REF, BOX, 5, 6, 7, 8, 9, 0, 0], 4, verified=True, drafted=5)
    closed = leave_label(step, torch.tensor([True]), ROLES)
    assert (closed.lengths, closed.drafted, closed.phase) == (3, 0, Phase.MTP)
    kept = leave_label(step, torch.tensor([False]), ROLES)
    assert (kept.lengths, kept.drafted, kept.phase) == (4, 5, Phase.VERIFIED)
    unclosed = leave_label(step._replace(lengths=torch.tensor([2])), torch.tensor([True]), ROLES)
    assert (unclosed.lengths, unclosed.drafted, unclosed.phase) == (2, 5, Phase.VERIFIED)


@pytest.mark.parametrize("mode", ["hybrid", "fast"])
def test_labels_are_next_token_decodings_and_boxes_are_windows(golden, mode):
    prompts = list({case["case"]: case for case in cases_of(golden)}.values())
    cases = [{**case, "generation_mode": mode, "verify_labels": True, "max_new_tokens": 60} for case in prompts]
    for key in ("temperature", "repetition_penalty", "top_p", "top_k"):
        cases = [{name: value for name, value in case.items() if name != key} for case in cases]
    batch = Batch(golden, cases)
    output = batch.run(output_scores=True)
    roles, tokenizer = batch.model.config.token_roles, tokenizer_of(golden)
    labels = boxes = 0
    for row, case in enumerate(cases):
        by = [phase for phase in output.accepted_by[row].tolist() if phase >= 0]
        new = output.sequences[row, batch.input_ids.shape[1] :][: len(by)].tolist()
        open_label, inside = False, []
        for token, phase in zip(new, by, strict=True):
            inside.append(open_label)
            assert (phase == 2) == open_label, (tokenizer.decode(new), by)
            labels, boxes = labels + (phase == 2), boxes + (token == roles.box_start and phase == 0)
            open_label = token == roles.ref_start or (open_label and token != roles.ref_end)
        lone = Batch(golden, [case])
        ids = torch.tensor([case["input_ids"] + new])
        with torch.no_grad():
            logits = lone.model(**{**lone.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits
        said = logits[0, len(case["input_ids"]) - 1 : -1].argmax(-1).tolist()
        assert [a for a, one in zip(new, inside, strict=True) if one] == [
            a for a, one in zip(said, inside, strict=True) if one
        ]
    assert labels > 30 and boxes > 10


def test_verified_labels_change_nothing_in_the_other_modes():
    cases = [case for case in cases_of("shapes") if case["generation_mode"] == "slow"][:20]
    batch = Batch("shapes", cases)
    assert batch.answers(batch.run(verify_labels=True)) == batch.expected()
    assert batch.answers(batch.run(verify_labels=True, generation_mode="verified")) == batch.expected()
