"""Hostile inputs: pictures, questions, ids and tensors of any kind are answered rightly or refused by name."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import model_of, processor_of
from tests.test_processing import SMALL, image, user

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
        assert re.match(r"conversation 0|text 0|images: got|videos: got", str(error)), error
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
    answer = "<ref>red circle</ref><box><100><0><300><500></box><|im_end|>"
    turns = [*user("Q"), {"role": "assistant", "content": answer}, *user("R")]
    assert f"{answer}<|im_end|>\n" in PROCESSOR.py_apply_chat_template(turns)


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
    with pytest.raises(ValueError, match="fps: got"):
        PROCESSOR(text="<video-1>", videos=[[SMALL]], **numbers)


def test_very_long_questions():
    question = "red circle " * 20_000
    inputs = PROCESSOR.apply_chat_template(user(image(SMALL), question), tokenize=True, return_dict=True)
    assert question in PROCESSOR.tokenizer.decode(inputs["input_ids"][0].tolist())
    with pytest.raises(ValueError, match=r"row 0: its prompt has \d+ tokens, at or over the length limit of 4096"):
        model_of("shapes").generate(**inputs)


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
