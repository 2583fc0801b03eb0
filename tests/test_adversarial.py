"""Hostile inputs: pictures, questions, ids and tensors of any kind are answered rightly or refused by name."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from locateanything.grounding import ANSWER_TOKENS, geometric_mean, parse_answer
from locateanything.processing import LocateAnythingProcessor
from tests.conftest import model_of
from tests.test_processing import ANSWER, SMALL, ids_of, image, processor_of, user

PROCESSOR = processor_of("shapes")
VOCABULARY = len(PROCESSOR.tokenizer)
START, END, SLOT = map(PROCESSOR.tokenizer.convert_tokens_to_ids, ("<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>"))
RESERVED = ("<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>")


def bounded(examples: int):
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


# ---------------------------------------------------------------------------------------------- questions

MARKUP = st.sampled_from(
    [*RESERVED, "<img>", "</img>", "<box>", "</box>", "<ref>", "</ref>", "<7>", "</c>", "<null>", "<text_mask>",
     "<|endoftext|>", "<image-1>", "<image-2>", "<video-1>", "<image-0>", f"<image-{'9' * 5000}>", "<image 1>",
     "<|im_", "end|>", "<IMG_", "CONTEXT>", "user\n", "assistant\n", "\n", "\0", "\ud83d", "\u202e", "e\u0301"]
)  # fmt: skip
QUESTIONS = st.lists(st.one_of(MARKUP, st.text(max_size=12)), max_size=6)


@bounded(400)
@given(parts=QUESTIONS, split=st.booleans(), pictures=st.integers(0, 2))
def test_a_question_forges_neither_slots_nor_turns(parts, split, pictures):
    """It is refused by name, or the prompt has the turns and slots of its conversation, and its words in them."""
    question = "".join(parts)
    conversation = user(*[image(SMALL)] * pictures, *(parts if split else [question]))
    try:
        inputs = PROCESSOR.apply_chat_template(
            conversation, tokenize=True, return_dict=True, add_generation_prompt=True
        )
    except ValueError as error:
        assert re.match(r"conversation 0|images: got|videos: got", str(error)), error
        hostile = (*RESERVED, "<image-", "<video-", "\ud83d")
        assert any(token in question for token in hostile), question
        return
    ids = inputs["input_ids"][0].tolist()
    assert not any(token in question for token in RESERVED)
    assert (ids.count(START), ids.count(END)) == (3, 2)
    shown = len(inputs.get("image_grid_hws", ()))
    assert ids.count(SLOT) == shown  # SMALL is one token
    assert shown == pictures
    if "<image-" not in question:
        prompt = PROCESSOR.tokenizer.decode(ids)
        words = unicodedata.normalize("NFC", question)
        assert f"{words}<|im_end|>\n<|im_start|>assistant\n" in unicodedata.normalize("NFC", prompt)
    assert PROCESSOR.post_process_grounding([ids])[0]["labels"] == []


@pytest.mark.parametrize("token", RESERVED)
@pytest.mark.parametrize("role", ["user", "system", "tool", "assistant"])
def test_marks_of_the_prompt_are_refused_in_every_call(token, role):
    pieces = [f"a {token[:5]}", f"{token[5:]} b"]
    for content in (f"a {token} b", [f"a {token} b"], pieces, [pieces[0], image(SMALL), f"{pieces[1]} <image-1>"]):
        conversation = [{"role": role, "content": content}, *user("Q")]
        for call in (
            PROCESSOR.py_apply_chat_template,
            PROCESSOR.apply_chat_template,
            lambda c: PROCESSOR.apply_chat_template(c, chat_template="{{ messages }}"),
            lambda c: PROCESSOR.apply_chat_template([user("Q"), c], tokenize=True),
        ):
            with pytest.raises(ValueError, match=rf"conversation [01]: a '{role}' message holds {re.escape(token)}"):
                call(conversation)
    with pytest.raises(ValueError, match="message holds"):
        PROCESSOR.py_apply_chat_template([{"role": f"user{token}", "content": ""}])


def test_an_answer_given_back_may_end_in_its_own_end_of_turn():
    turns = [*user("Q"), {"role": "assistant", "content": ANSWER}, *user("R")]
    assert f"{ANSWER}<|im_end|>\n" in PROCESSOR.py_apply_chat_template(turns)


@bounded(150)
@given(st.lists(st.text(st.characters(codec=None), max_size=300), min_size=1, max_size=4))
def test_texts_of_any_unicode(texts):
    try:
        inputs = PROCESSOR(text=texts, return_tensors="pt")
    except ValueError as error:
        assert any("\ud800" <= letter <= "\udfff" for letter in "".join(texts)) or "<" in "".join(texts), error
        assert re.match(r"text \d: holds|images: got|videos: got", str(error)), error
        return
    for text, ids, mask in zip(texts, inputs["input_ids"], inputs["attention_mask"], strict=True):
        decoded = PROCESSOR.tokenizer.decode(ids[mask.bool()].tolist())
        assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("numbers", [{"fps": [float("nan")]}, {"fps": 10**400}, {"timestamps": [[float("inf")]]}])
def test_times_that_are_no_numbers(numbers):
    with pytest.raises(ValueError, match=r"fps: got|timestamps: got"):
        PROCESSOR(text="<video-1>", videos=[[SMALL]], **numbers)


def test_very_long_questions():
    question = "red circle " * 20_000
    ids = PROCESSOR.apply_chat_template(user(image(SMALL), question), tokenize=True, return_dict=True)["input_ids"]
    assert question in PROCESSOR.tokenizer.decode(ids[0].tolist())
    with pytest.raises(ValueError, match=r"row 0: its prompt has \d+ tokens, at or over the length limit of 4096"):
        model_of("shapes").generate(input_ids=ids)


# ---------------------------------------------------------------------------------------------- answers

TOKENS = sorted(ANSWER_TOKENS & set(PROCESSOR.tokenizer.get_vocab()))
ANSWER_IDS = dict(zip(PROCESSOR.tokenizer.convert_tokens_to_ids(TOKENS), TOKENS, strict=True))
OPENING = [START, *ids_of(PROCESSOR, "assistant\n")]
FRAGMENTS = [
    *(ids_of(PROCESSOR, words) for words in (ANSWER, "<ref>é圆</ref><box><1><2><3><4></box>")),
    *(OPENING, [START, *ids_of(PROCESSOR, "user\n")], [END]),
    *([-100], [-1], [2**40], [VOCABULARY]),
]
SPELLED = [index for letter in "<ref>cat</ref><box><1><2></box>" for index in ids_of(PROCESSOR, letter)]
ANY_ID = st.one_of(st.integers(0, VOCABULARY - 1), st.sampled_from(sorted(ANSWER_IDS)), st.integers(-(2**70), 2**70))
# token by token, in whole fragments, and with what letters spell
ROWS = st.lists(st.one_of(ANY_ID.map(lambda i: [i]), st.sampled_from([*FRAGMENTS, SPELLED])), max_size=12).map(
    lambda parts: [index for part in parts for index in part]
)


def boxes_of(ids: list[int]) -> list[tuple[int, ...]]:
    """Every box and point that a row's own tokens hold, by brute force: <box>, 2 or 4 coordinates, </box>."""
    words = [ANSWER_IDS.get(index, "") for index in ids]
    found = []
    for start, word in enumerate(words):
        for count in (2, 4):
            inside = words[start + 1 : start + 1 + count]
            closed = words[start + 1 + count : start + 2 + count] == ["</box>"]
            if word == "<box>" and closed and all(piece[1:-1].isdigit() for piece in inside):
                x, y = (sorted(int(piece[1:-1]) for piece in inside[axis::2]) for axis in (0, 1))
                found.append((x[0], y[0], *([x[-1], y[-1]] if count == 4 else [])))
    return found


def answer_part(ids: list[int]) -> list[int]:
    starts = [i for i in range(len(ids)) if ids[i : i + len(OPENING)] == OPENING]
    part = ids[starts[-1] + len(OPENING) :] if starts else [] if START in ids else ids
    return part[: part.index(END)] if END in part else part


def check_found(row: dict, expected: list[tuple[int, ...]]) -> None:
    for kind, labels, places in (("boxes", "labels", 4), ("points", "point_labels", 2)):
        wanted = [box for box in expected if len(box) == places]
        assert row[kind].mul(1000).round().int().tolist() == [list(box) for box in wanted]
        assert len(row[labels]) == len(wanted) and all(isinstance(label, str) for label in row[labels])


@bounded(200)
@given(st.lists(ROWS, max_size=4))
def test_ids_of_any_kind_invent_no_box(rows):
    found = PROCESSOR.post_process_grounding(rows) if all(rows) else [
        PROCESSOR.post_process_grounding([row])[0] for row in rows
    ]  # fmt: skip
    for ids, row in zip(rows, found, strict=True):
        check_found(row, boxes_of(answer_part(ids)))
    assert len(PROCESSOR.post_process_image_text_to_text(rows)) == len(rows)


class Output:
    def __init__(self, sequences, scores):
        self.sequences, self.token_log_probs = sequences, scores


SCORES = st.one_of(st.floats(-20, 0), st.floats(width=32))


@bounded(150)
@given(ids=ROWS.filter(len), prompt=st.integers(0, 4), threshold=st.none() | st.floats(0, 1), data=st.data())
def test_scored_ids_of_any_kind_invent_no_box(ids, prompt, threshold, data):
    new = len(ids) - min(prompt, len(ids) - 1)
    scores = data.draw(st.lists(SCORES, min_size=new, max_size=new))
    (row,) = PROCESSOR.post_process_grounding(Output([ids], torch.tensor([scores])), threshold=threshold)
    told = ids[len(ids) - new :][: next((i for i, score in enumerate(scores) if score != score), new)]
    expected = boxes_of(told[: told.index(END)] if END in told else told)
    if not threshold:
        check_found(row, expected)
    for kind, prefix in (("boxes", ""), ("points", "point_")):
        got = [tuple(box) for box in row[kind].mul(1000).round().int().tolist()]
        assert all(box in expected for box in got)
        for name in (f"{prefix}scores", f"{prefix}label_scores"):
            assert row[name].shape == (len(got),) and ((row[name] >= 0) & (row[name] <= 1)).all()
        assert (row[f"{prefix}scores"] >= np.float32(threshold or 0)).all()


@bounded(120)
@given(st.lists(st.one_of(st.text(st.characters(codec=None), max_size=40), ROWS.map(
    lambda ids: "".join(ANSWER_IDS.get(i, "x") for i in ids)))))  # fmt: skip
def test_texts_of_any_kind_invent_no_box(texts):
    for text, row in zip(texts, PROCESSOR.post_process_grounding(texts), strict=True):
        assert len(row["boxes"]) + len(row["points"]) <= len(parse_answer(text))
        assert len(row["boxes"]) + len(row["points"]) <= text.count("<box>")


def test_letters_that_spell_a_box_are_no_box():
    assert PROCESSOR.tokenizer.decode(SPELLED) == "<ref>cat</ref><box><1><2></box>"
    for outputs in ([SPELLED], torch.tensor([SPELLED]), Output(torch.tensor([SPELLED]), torch.zeros(1, len(SPELLED)))):
        (row,) = PROCESSOR.post_process_grounding(outputs)
        assert row["labels"] == row["point_labels"] == []
    # nor do letters end the answer, or begin another
    turn = [index for letter in "<|im_end|><|im_start|>assistant\n" for index in ids_of(PROCESSOR, letter)]
    (row,) = PROCESSOR.post_process_grounding([[*ids_of(PROCESSOR, ANSWER)[:-1], *turn, *ids_of(PROCESSOR, ANSWER)]])
    assert row["labels"] == ["red circle"] * 2


def test_broken_bytes_in_a_label_are_shown_as_such():
    label = ids_of(PROCESSOR, "圆")[:-1]
    ids = [*ids_of(PROCESSOR, "<ref>"), *label, *ids_of(PROCESSOR, "</ref><box><1><2></box>")]
    assert PROCESSOR.post_process_grounding([ids])[0]["point_labels"] == ["\ufffd"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            Output([[5, 6]], torch.zeros(1, 3)),
            r"token_log_probs torch.float32 \[1, 3\] for 1 sequence\(s\) of \[2\] ids",
        ),
        (Output([[5, 6]], torch.zeros(3)), r"\[3\]"),
        (Output([[5, 6]], torch.zeros(2, 2)), r"\[2, 2\]"),
        (Output([[5, 6]], torch.zeros(1, 2, dtype=torch.long)), "expected floating point"),
        (Output([[5, 6]], np.array([["a", "b"]])), "expected floating point"),
        (Output([[5, 6]], np.array([[1j, 2]])), "expected floating point"),
        (
            Output([[5, 6]], torch.zeros(1, 2).to_sparse()),
            "outputs.token_log_probs: got a tensor whose values cannot be read",
        ),
        (torch.eye(2, dtype=torch.long).to_sparse(), "outputs: got a tensor whose values cannot be read"),
        (torch.zeros(1, 2, dtype=torch.long, device="meta"), "outputs: got a tensor whose values cannot be read"),
        ([torch.zeros(2, dtype=torch.long, device="meta")], "outputs: got a tensor whose values cannot be read"),
    ],
)
def test_scores_that_do_not_fit_are_refused(output, message):
    with pytest.raises(ValueError, match=f"outputs: got token_log_probs.*{message}|{message}"):
        PROCESSOR.post_process_grounding(output)


def test_a_threshold_on_another_librarys_scores_is_not_ignored():
    with pytest.raises(ValueError, match=r"threshold: got 0\.5 for outputs without scores"):
        PROCESSOR.post_process_grounding(Output([[5, 6]], (torch.zeros(1, 9),)), threshold=0.5)


@pytest.mark.parametrize("sizes", [torch.ones(1, 2).to_sparse(), [torch.ones(2, device="meta")]])
def test_sizes_without_values(sizes):
    with pytest.raises(ValueError, match="target_sizes: got a tensor whose values cannot be read"):
        PROCESSOR.post_process_grounding([ANSWER], sizes)


@pytest.mark.parametrize("size", [(float("inf"), 2), (float("nan"), 2), (10**400, 2), (-1, 2), ("1", 2), (None, 2)])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="target_sizes: got"):
        PROCESSOR.post_process_grounding([ANSWER], [size])


def test_numbers_of_numpy_are_numbers():
    ids = [np.int64(index) for index in ids_of(PROCESSOR, ANSWER)]
    (row,) = PROCESSOR.post_process_grounding([ids], [(np.int64(100), np.float32(200))])
    assert row["labels"] == ["red circle"]


@given(st.lists(st.floats(allow_nan=False)))
def test_a_mean_is_a_probability(values):
    assert 0 <= geometric_mean(values) <= 1


# ---------------------------------------------------------------------------------------------- generate

ASKED = st.tuples(
    st.lists(st.tuples(st.integers(1, 80), st.integers(1, 80)), max_size=2),
    st.text(max_size=20).filter(lambda text: "<" not in text),
    st.sampled_from(["hybrid", "fast", "slow", "verified"]),
    st.integers(1, 12),
)


@bounded(15)
@given(st.lists(ASKED, min_size=1, max_size=5), st.integers(1, 5))
def test_rows_of_any_shape_equal_themselves_alone(rows, slots):
    model = model_of("shapes")

    def ask(rows):
        conversations = [user(*(image(Image.new("RGB", s, "red")) for s in sizes), words) for sizes, words, *_ in rows]
        inputs = PROCESSOR.apply_chat_template(
            conversations, tokenize=True, return_dict=True, add_generation_prompt=True, padding=True
        )
        modes, most = [row[2] for row in rows], [row[3] for row in rows]
        output = model.generate(**inputs, generation_mode=modes, max_new_tokens=most, max_batch_rows=slots)
        PROCESSOR.post_process_grounding(output)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    pad = model.config.pad_token_id
    for row, together in zip(rows, ask(rows), strict=True):
        (alone,) = ask([row])
        assert together[: len(alone)] == alone and set(together[len(alone) :]) <= {pad}


# ---------------------------------------------------------------------------------------------- processors


def test_another_tokenizer_is_refused():
    class Other:
        unk_token_id = None
        padding_side = "left"
        chat_template = None
        model_max_length = 99
        deprecation_warnings: dict = {}
        shift: dict = {}

        def get_added_vocab(self):
            return PROCESSOR.tokenizer.get_added_vocab()

        def convert_tokens_to_ids(self, tokens):
            if not isinstance(tokens, str):
                return [self.convert_tokens_to_ids(token) for token in tokens]
            return self.shift.get(tokens, PROCESSOR.tokenizer.convert_tokens_to_ids(tokens))

    class Plain(LocateAnythingProcessor):
        def check_argument_for_proper_class(self, *args):
            return type(None)

    for word in ("<box", 5, None, ""):
        for name in ("image_token", "video_token", "image_start_token", "image_end_token"):
            with pytest.raises(
                ValueError, match=rf"{name}: got .*; expected a text|no token '<box' of its own, the {name}"
            ):
                Plain(PROCESSOR.image_processor, Other(), **{name: word})
    for name in ("image_placeholder", "video_placeholder"):
        with pytest.raises(ValueError, match=f"{name}: got 5; expected a text"):
            Plain(PROCESSOR.image_processor, Other(), **{name: 5})
    with pytest.raises(ValueError, match="video_placeholder: got 'image', the image_placeholder's"):
        Plain(PROCESSOR.image_processor, Other(), video_placeholder="image")
    with pytest.raises(ValueError, match="merge_kernel_size: got 5"):
        Plain(PROCESSOR.image_processor, Other(), merge_kernel_size=5)
    for most in ("x", None, float("nan"), -1):
        Other.model_max_length = most
        with pytest.raises(ValueError, match="tokenizer: its model_max_length is"):
            Plain(PROCESSOR.image_processor, Other())
    Other.model_max_length = 99
    for token, index, message in (
        ("<|im_end|>", None, "no token '<|im_end|>'"),
        ("<500>", None, "<500> has the id None; expected 932"),
        ("<7>", 3, "<7> has the id 3; expected 439, as <0> has 432"),
    ):
        Other.shift = {token: index}
        with pytest.raises(ValueError, match=re.escape(message)):
            Plain(PROCESSOR.image_processor, Other())
