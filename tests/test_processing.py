"""Pixels and prompts against the goldens and the published processor's behaviour; layouts, errors, answers."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from locateanything.processing import LocateAnythingProcessor
from tests.conftest import CHECKPOINTS, GOLDENS, cases_of, processor_of
from upload_to_hub import remote_code_files

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.\n<|im_end|>\n"
START, END = "<|im_start|>", "<|im_end|>\n"
WIDE = Image.new("RGB", (125, 93), (200, 30, 30))  # 8×10 patches, 20 tokens
SQUARE = Image.new("RGB", (140, 140), (30, 200, 30))  # 10×10 patches, 25 tokens
SMALL = Image.new("RGB", (20, 20), (30, 30, 200))  # 2×2 patches, 1 token
A, B, S = "<img>*20</img>", "<img>*25</img>", "<img>*1</img>"


@pytest.fixture(scope="module")
def processor() -> LocateAnythingProcessor:
    return processor_of("shapes")


def image(source=WIDE) -> dict:
    return {"type": "image", "image": source}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*items, role: str = "user") -> list[dict]:
    return [{"role": role, "content": list(items)}]


def ids_of(processor, words: str) -> list[int]:
    return processor.tokenizer(words)["input_ids"]


def shown(processor, inputs) -> list[str]:
    """Each row without padding, runs of slots as *count."""
    rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    texts = [
        processor.tokenizer.decode(torch.as_tensor(ids)[torch.as_tensor(mask).bool()].tolist()) for ids, mask in rows
    ]
    return [re.sub(r"(?:<IMG_CONTEXT>)+", lambda run: f"*{len(run[0]) // 13}", row) for row in texts]


# ---------------------------------------------------------------------------------------------- goldens


def golden_conversation(golden: str, case: dict) -> list[dict]:
    pictures = [image(GOLDENS / golden / "images" / name) for name in case["images"]]
    if case["layout"] == "image-question":
        return user(*pictures, text(case["question"]))
    return user(pictures[0], text(case["question"] + " "), pictures[1])


def test_every_golden_prompt(golden):
    """Alone by the card's calls, and all in one padded batch by transformers'."""
    processor = processor_of(golden)
    cases = list({case["case"]: case for case in cases_of(golden)}.values())
    assert len(cases) == {"shapes": 60, "shapes-early": 14}[golden]
    conversations = [golden_conversation(golden, case) for case in cases]
    batch = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, padding=True, add_generation_prompt=True
    )
    pixels = []
    for row, (case, conversation) in enumerate(zip(cases, conversations, strict=True)):
        prompt = processor.py_apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        assert prompt == processor.apply_chat_template(conversation, add_generation_prompt=True)
        images, videos = processor.process_vision_info(conversation)
        alone = processor(text=[prompt], images=images, videos=videos, return_tensors="pt")
        assert alone["input_ids"].tolist() == [case["input_ids"]]
        assert alone["image_grid_hws"].tolist() == case["image_grid_hws"]
        length = len(case["input_ids"])
        assert batch["input_ids"][row, -length:].tolist() == case["input_ids"]
        assert batch["attention_mask"][row].sum() == length
        assert batch["attention_mask"][row, -length:].all()
        pixels.append(alone["pixel_values"])
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))
    grids = [grid for case in cases for grid in case["image_grid_hws"]]
    assert batch["image_grid_hws"].tolist() == grids
    same_prompt = {case["case"]: case["input_ids"] for case in cases}
    assert all(case["input_ids"] == same_prompt[case["case"]] for case in cases_of(golden))


# ---------------------------------------------------------------------------------------------- prompts

# Conversation, and the prompt behind the default system turn, as recorded from the published processor.
PROMPTS = [
    (user(image(), text("Q.")), "<image-1>Q."),
    (user(text("Q."), image()), "Q.<image-1>"),
    (user(image(), text("a "), image(), text(" b")), "<image-1>a <image-2> b"),
    (user(image(), text("  Q \n")), "<image-1>  Q \n"),
    (user(text("a"), text("b")), "ab"),
    (user("a", "b"), "ab"),
    (user(), ""),
    ([{"role": "user", "content": "<image-1>hello"}], "<image-1>hello"),
    ([{"role": "user", "content": (image(), text("Q."))}], "<image-1>Q."),
    (user({"image": WIDE}, {"text": "Q."}), "<image-1>Q."),
    (user({"type": "image"}, text("Q.")), "<image-1>Q."),
    (user({"type": "image_url", "image_url": {"url": "x"}}, text("q")), "<image-1>q"),
    (user({"type": "text", "text": "q", "image": WIDE}), "<image-1>"),
    (user({"type": "text", "text": "q", "image": None}), "q"),
    (user(image(), {"type": "text"}), "<image-1>"),
    (user(image(), text("in <image-1> find")), "in <image-1> find"),
    (user(text("in <image-1> find"), image()), "in <image-1> find"),
    (user(image(), image(), text("in <image-2> find")), "<image-1>in <image-2> find"),
    (user(image(), image(), text("in <image-1> find")), "<image-2>in <image-1> find"),
    (user(image(), image(), text("<image-2> vs <image-1>")), "<image-2> vs <image-1>"),
    (user(image(), text("in <image 1> find")), "<image-1>in <image 1> find"),
    (user(image(), {"type": "video", "video": [WIDE]}, text("Q.")), "<image-1><video-1>Q."),
    (user({"type": "video", "video": [WIDE]}, text("in <video-1> find")), "in <video-1> find"),
]


@pytest.mark.parametrize(("conversation", "content"), PROMPTS)
def test_prompts(processor, conversation, content):
    prompt = f"{SYSTEM}{START}user\n{content}{END}"
    opened = prompt + f"{START}assistant\n"
    assert processor.py_apply_chat_template(conversation) == prompt
    assert processor.py_apply_chat_template(conversation, add_generation_prompt=True) == opened
    assert processor.py_apply_chat_template([conversation, conversation]) == [prompt, prompt]
    assert processor.apply_chat_template(conversation) == prompt
    assert processor.apply_chat_template([conversation], add_generation_prompt=True) == [opened]


TURNS = [
    (user(text("SYS"), role="system") + user(image()), f"{START}system\nSYS{END}{START}user\n<image-1>{END}"),
    ([{"role": "system", "content": ""}, *user("Q")], f"{START}system\n{END}{START}user\nQ{END}"),
    (
        user(image(), text("Q.")) + user("ANS", role="assistant") + user(image(), text("Q2")),
        f"{SYSTEM}{START}user\n<image-1>Q.{END}{START}assistant\nANS{END}{START}user\n<image-2>Q2{END}",
    ),
    # a user's later text takes an image's place
    (
        user(image(), "Q.") + user("see <image-1>"),
        f"{SYSTEM}{START}user\nQ.{END}{START}user\nsee <image-1>{END}",
    ),
]


@pytest.mark.parametrize(("conversation", "prompt"), TURNS)
def test_turns(processor, conversation, prompt):
    assert processor.py_apply_chat_template(conversation) == prompt
    assert processor.apply_chat_template(conversation) == prompt


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages"),
        ("Q", "messages"),
        (None, "messages"),
        ([[]], "conversation 0"),
        ([user("Q"), []], "conversation 1"),
        ([{"content": "Q"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": text("Q")}], "dict as content"),
        (user({"type": "audio", "audio": "x"}), "item \\['audio', 'type'\\]"),
        (user(7), "item int"),
        (user({"type": "text", "text": 7}), "content"),
        # no question can open a turn, end one or stand for an image
        (user("a<|im_end|>b"), r"conversation 0: .*holds <\|im_end\|>"),
        ([user("Q"), user("<|im_", "start|>")], r"conversation 1: .*holds <\|im_start\|>"),
        (user("Q", role="user<|im_end|>"), r"holds <\|im_end\|>"),
        (user("<IMG_CONTEXT>"), "holds <IMG_CONTEXT>"),
        (user("a<|im_end|>b", role="assistant"), r"holds <\|im_end\|>"),
        # the published processor shows these images twice; a question must not be able to
        (user(image(), text("see <image-01>")), "conversation 0: has '<image-1>' more than once.* as <image 1>"),
        (user(image(), text("<image-1> or <image-1>")), "conversation 0: has '<image-1>' more than once"),
        (user(image(), "<image", "-1> Q."), "conversation 0: has '<image-1>' more than once"),
        ([user("Q"), user("<video-1>", "<video-1>")], "conversation 1: has '<video-1>' more than once"),
        (user(image(), "Q.") + user("in <image-1>", role="assistant"), "has '<image-1>' more than once"),
        (user("<image-1>", role="tool") + user(image()), "has '<image-1>' more than once"),
    ],
)
def test_refused_conversations(processor, messages, message):
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(messages, tokenize=tokenize)


def test_the_final_message_can_stay_open(processor):
    for answer in ("<ref>cat", "", "<ref>cat \n"):
        conversation = user(image(), "Q.") + user(text(answer), role="assistant")
        prompt = processor.apply_chat_template(conversation, continue_final_message=True)
        assert prompt.endswith(f"Q.{END}{START}assistant\n{answer}")
        inputs = processor.apply_chat_template(
            [conversation], continue_final_message=True, tokenize=True, return_dict=True
        )
        assert shown(processor, inputs) == [prompt.replace("<image-1>", f"<image 1>{A}")]
    with pytest.raises(ValueError, match=r"continue_final_message|add_generation_prompt"):
        processor.apply_chat_template(conversation, continue_final_message=True, add_generation_prompt=True)


def test_what_the_assistant_said_can_be_masked(processor):
    """Whatever side is padded, and however much the images before it take."""
    answer = "<ref>cat</ref><box><1><2><3><4></box>"
    long = user(image(), "Q.") + user(answer, role="assistant") + user(image(SQUARE), "And?")
    long += user("none", image(SMALL), role="assistant")
    short = user("Q") + user("yes", role="assistant")
    for options in ({}, {"padding_side": "right"}, {"padding": "max_length", "max_length": 200}):
        for tensors in ("pt", "np"):
            inputs = processor.apply_chat_template(
                [long, short],
                tokenize=True,
                return_dict=True,
                return_tensors=tensors,
                return_assistant_tokens_mask=True,
                **options,
            )
            masked = {**inputs, "attention_mask": inputs["assistant_masks"]}
            assert shown(processor, masked) == [f"{answer}<|im_end|>none<image 3>{S}<|im_end|>", "yes<|im_end|>"]
            assert inputs["assistant_masks"].shape == inputs["input_ids"].shape
            assert inputs.keys() == {
                "input_ids",
                "attention_mask",
                "pixel_values",
                "image_grid_hws",
                "assistant_masks",
            }
    (mask,) = processor.apply_chat_template(
        short, tokenize=True, return_dict=True, return_tensors=None, return_assistant_tokens_mask=True
    )["assistant_masks"]
    assert isinstance(mask, list) and sum(mask) == len(ids_of(processor, "yes<|im_end|>"))


def test_offsets_are_those_of_the_text_as_given(processor):
    texts = ["<image-1>see cat", "é<video-1>"]
    inputs = processor(text=texts, images=[SMALL], videos=[[SMALL, SMALL]], return_offsets_mapping=True)
    for given, ids, offsets in zip(texts, inputs["input_ids"], inputs["offset_mapping"], strict=True):
        assert len(ids) == len(offsets)
        for index, (start, stop) in zip(ids, offsets, strict=True):
            word = processor.tokenizer.decode([index])
            assert given[start:stop] == word or given[start] in ("<", "é")
        assert offsets == sorted(offsets)
    padded = processor(text=texts, images=[SMALL], videos=[[SMALL]], return_offsets_mapping=True, return_tensors="pt")
    assert padded["offset_mapping"].shape == (*padded["input_ids"].shape, 2)
    assert "offset_mapping" not in processor(text="a")


def find(what: str) -> str:
    """Finds it.

    Args:
        what: the thing.
    """
    return what


def test_a_template_that_is_passed_is_used(processor):
    template = "{% for m in messages %}{{ m.role }}:<image-1>{{ extra }}{% endfor %}"
    conversation = user(image(), text("Q."))
    assert processor.apply_chat_template(conversation, chat_template=template, extra="!") == "user:<image-1>!"
    call = {"extra": "!", "tokenize": True, "return_dict": True}
    inputs = processor.apply_chat_template([conversation], chat_template=template, **call)
    assert shown(processor, inputs) == ["user:<image 1><img>*20</img>!"]
    with pytest.raises(ValueError, match="conversation 0: has '<image-1>' more than once"):
        processor.apply_chat_template(conversation * 2, chat_template=template)


def test_tools_and_documents_are_the_templates(processor):
    template = (
        "{% for tool in tools %}{{ tool.function.name }} {% endfor %}"
        "{% for document in documents %}{{ document.title }} {% endfor %}"
        "{% for m in messages %}{% for item in m.content %}{{ item.text }}{% endfor %}{% endfor %}"
    )
    given = {"tools": [find], "documents": [{"title": "map", "text": "x"}]}
    assert (
        processor.apply_chat_template(user(image(), "Q."), chat_template=template, **given) == "find map <image-1>Q."
    )
    call = {"tokenize": True, "return_dict": True, "processor_kwargs": {"padding": True}}
    inputs = processor.apply_chat_template([user(image(), "Q.")], chat_template=template, **given, **call)
    assert shown(processor, inputs) == [f"find map <image 1>{A}Q."]
    nothing = dict.fromkeys(given)  # as callers hand on what they were not given
    assert processor.apply_chat_template(user("Q"), **nothing) == processor.apply_chat_template(user("Q"))
    for name, value in given.items():  # the card's prompt has no place for them
        with pytest.raises(TypeError, match=name):
            processor.apply_chat_template(user("Q"), **{name: value})


def test_results_of_apply_chat_template(processor, caplog):
    short, long = user(image(SMALL), "a"), user(image(), "a longer question")
    ids = processor.apply_chat_template(short, tokenize=True)
    assert isinstance(ids[0], list)
    assert processor.py_apply_chat_template(short, tokenize=True) == ids
    assert len(processor.apply_chat_template([short, long], tokenize=True)) == 2
    batch = processor.apply_chat_template([short, long], tokenize=True, return_dict=True)
    assert batch["input_ids"].shape[0] == 2
    assert batch["input_ids"][0, 0] == processor.tokenizer.pad_token_id
    listed = processor.apply_chat_template([short, long], tokenize=True, return_dict=True, return_tensors=None)
    assert len(listed["input_ids"][0]) < len(listed["input_ids"][1])
    to_length = {"padding": "max_length", "max_length": 99}
    for options in (to_length, {"processor_kwargs": to_length}, {"processor_kwargs": {"text_kwargs": to_length}}):
        padded = processor.apply_chat_template([short], tokenize=True, return_dict=True, **options)
        assert padded["input_ids"].shape == (1, 99)
    for call in (
        {"paddding": True},
        {"processor_kwargs": {"do_resize": True}},
        {"tokenize": True, "return_dikt": True},
    ):
        with pytest.raises(TypeError, match=r"unknown keyword (paddding|do_resize|return_dikt)"):
            processor.apply_chat_template(short, **call)
    assert not caplog.records


# ---------------------------------------------------------------------------------------------- vision info


def test_vision_info(processor, tmp_path):
    file = tmp_path / "wide.png"
    WIDE.save(file)
    conversation = user(image(file), "a") + user(image(np.asarray(SQUARE)), role="assistant")
    images, videos = processor.process_vision_info(conversation)
    assert [picture.size for picture in images] == [WIDE.size, SQUARE.size]
    assert videos is None
    for item in ({"path": file}, {"url": file.as_uri()}, {"image_url": {"url": str(file)}}, {"image": str(file)}):
        (picture,), _ = processor.process_vision_info(user({"type": "image", **item}))
        assert picture.tobytes() == WIDE.tobytes()
    assert processor.process_vision_info([user("Q"), user(image())])[0][0].size == WIDE.size
    assert processor.process_vision_info(user("Q")) == (None, None)
    assert processor.process_vision_info(user("Q"), return_video_kwargs=True)[2] == {"fps": [], "timestamps": []}


def test_video_info(processor):
    video = {"type": "video", "video": [WIDE, np.asarray(SQUARE)]}
    told = {**video, "fps": 4.0, "timestamps": [0.5, 1.0]}
    images, videos, kwargs = processor.process_vision_info(user(video, told, "Q"), return_video_kwargs=True)
    assert images is None
    assert [[frame.size for frame in clip] for clip in videos] == [[WIDE.size, SQUARE.size]] * 2
    assert kwargs == {"fps": [2.0, 4.0], "timestamps": [[-1, -1], [0.5, 1.0]]}
    for item, message in (
        ({"type": "image"}, "keys \\['type'\\]"),
        ({"type": "video"}, "video"),
        ({"type": "video", "url": "clip.mp4"}, "no video decoder"),
        ({"type": "image", "image": "no/such.png"}, "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.process_vision_info(user(item))


def test_sizes_of_items_count_in_every_call(processor):
    """As many slots as the resized picture has tokens, and its pixels."""
    for keys, tokens in (
        ({}, 20),
        ({"min_pixels": 28 * 28 * 30}, 35),
        ({"max_pixels": 28 * 28 * 6}, 4),
        ({"resized_height": 56, "resized_width": 84}, 6),
        ({"max_pixels": None, "text": None}, 20),
    ):
        conversation = user({**image(), **keys}, "Q")
        called = processor.apply_chat_template([conversation], tokenize=True, return_dict=True)
        assert f"<img>*{tokens}</img>" in shown(processor, called)[0], keys
        prompt = processor.py_apply_chat_template(conversation)
        images, _ = processor.process_vision_info(conversation)
        by_card = processor(text=[prompt], images=images, return_tensors="pt")
        given = processor(text=[prompt], images=[{"image": WIDE, **keys}], return_tensors="pt")
        assert all(torch.equal(called[key], other[key]) for key in called for other in (by_card, given))
    for value in ([WIDE, WIDE], [np.asarray(WIDE)]):
        video = user({"type": "video", "video": value, "max_pixels": 28 * 28 * 6, "fps": 1.0}, "Q")
        called = processor.apply_chat_template(video, tokenize=True, return_dict=True)
        assert called["image_grid_hws"].tolist() == [[4, 4]] * len(value)
    with pytest.raises(ValueError, match="nframes"):
        processor.process_vision_info(user({"type": "video", "video": [WIDE], "nframes": 3}))
    with pytest.raises(ValueError, match=r"images\[1\]\[0\]: .*min_pixel'"):
        processor.apply_chat_template([user("Q"), user({**image(), "min_pixel": 3})], tokenize=True)
    with pytest.raises(ValueError, match="resized_height"):
        processor.process_vision_info(user({**image(), "resized_height": 56}))


def test_pictures_can_be_turned_upright(processor):
    lying = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (280, 28)).save(lying, "PNG", exif=exif)
    conversation = user(image(lying.getvalue()), {"type": "video", "video": [lying.getvalue()]}, "Q")
    upright = LocateAnythingProcessor(copy.deepcopy(processor.image_processor), processor.tokenizer)
    upright.image_processor.upright = True
    for each, grid, size in ((processor, [2, 20], (280, 28)), (upright, [20, 2], (28, 280))):
        inputs = each.apply_chat_template(conversation, tokenize=True, return_dict=True)
        assert inputs["image_grid_hws"].tolist() == [grid, grid]
        images, videos = each.process_vision_info(conversation)
        assert images[0].size == videos[0][0].size == size


# ---------------------------------------------------------------------------------------------- the call


@pytest.mark.parametrize(
    ("texts", "images", "rows", "grids"),
    [
        ("<image-1>Q.", [WIDE], [f"<image 1>{A}Q."], [[8, 10]]),
        ("<image-1>Q.", WIDE, [f"<image 1>{A}Q."], [[8, 10]]),
        ("<image-01>Q.", (WIDE,), [f"<image 1>{A}Q."], [[8, 10]]),
        (["hello"], None, ["hello"], None),
        (["hello"], [], ["hello"], None),
        (["<image-1>a <image-2>"], [WIDE, SQUARE], [f"<image 1>{A}a <image 2>{B}"], [[8, 10], [10, 10]]),
        (["<image-2>a <image-1>"], [WIDE, SQUARE], [f"<image 2>{B}a <image 1>{A}"], [[10, 10], [8, 10]]),
        (["<image-1>a<image-1>"], [WIDE], [f"<image 1>{A}a<image 1>{A}"], [[8, 10], [8, 10]]),
        (
            ["<image-1>a", "b", "<image-1><image-2>c"],
            [WIDE, SMALL, SQUARE],
            [f"<image 1>{A}a", "b", f"<image 1>{S}<image 2>{B}c"],
            [[8, 10], [2, 2], [10, 10]],
        ),
        (
            ["<image-1>a", "b", "<image-2><image-1>c"],
            [[WIDE], [], [SQUARE, SMALL]],
            [f"<image 1>{A}a", "b", f"<image 2>{S}<image 1>{B}c"],
            [[8, 10], [2, 2], [10, 10]],
        ),
    ],
)
def test_images_of_texts(processor, texts, images, rows, grids):
    inputs = processor(text=texts, images=images, return_tensors="pt")
    assert shown(processor, inputs) == rows
    assert inputs.get("image_grid_hws", torch.empty(0)).tolist() == (grids or [])
    assert ("pixel_values" in inputs) == (grids is not None)
    if grids:
        assert inputs["image_grid_hws"].dtype == torch.int64
        assert inputs["pixel_values"].shape == (sum(h * w for h, w in grids), 3, 14, 14)


def test_the_pixels_stand_in_the_order_of_the_slots(processor):
    pixels = [processor.image_processor(picture)["pixel_values"] for picture in (WIDE, SQUARE, SMALL)]
    inputs = processor(text=["<image-2><image-1>", "<image-1>"], images=[WIDE, SQUARE, SMALL], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], torch.cat([pixels[1], pixels[0], pixels[2]]))


def test_rows_about_one_file_read_it_once(processor, tmp_path, monkeypatch):
    """By the text that names it or by the object, however it is wrapped; with another size it is another picture."""
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    opened = []
    monkeypatch.setattr(Image, "open", lambda *args, open=Image.open: opened.append(args) or open(*args))
    texts = [f"<image-1>{word}" for word in ("a", "b", "c")]
    alone = processor(images=path, text=texts[0], return_tensors="pt")
    for images in ([path] * 3, [{"path": path}, {"path": path}, {"path": path}], [(tmp_path / "a.png")] * 3):
        opened.clear()
        out = processor(images=images, text=texts, return_tensors="pt")
        assert len(opened) == 1
        assert torch.equal(out["pixel_values"], torch.cat([alone["pixel_values"]] * 3))
    opened.clear()
    out = processor(images=[{"path": path}, {"path": path, "resized_height": 84, "resized_width": 84}], text=texts[:2])
    assert len(opened) == 2 and out["image_grid_hws"].tolist() == [[4, 6], [6, 6]]


def test_expanded_text_is_left_alone(processor):
    expanded = [
        f"<image 1><img>{'<IMG_CONTEXT>' * 20}</img>Q.<image 2><img>{'<IMG_CONTEXT>' * 25}</img>",
        f"<img>{'<IMG_CONTEXT>'}</img>",
    ]
    inputs = processor(text=expanded, images=[WIDE, SQUARE, SMALL], return_tensors="pt")
    assert shown(processor, inputs) == [f"<image 1>{A}Q.<image 2>{B}", S]
    with pytest.raises(ValueError, match="holds a run of 20 image slots; its image needs 25"):
        processor(text=expanded, images=[SQUARE, WIDE, SMALL])
    with pytest.raises(ValueError, match=r"images: got 1; .* take"):
        processor(text=expanded, images=[SQUARE])
    with pytest.raises(ValueError, match="text 1: names images"):
        processor(text=expanded, images=[[WIDE, SQUARE], []])


V1, V2 = "<video-1>", "<video-2>"


@pytest.mark.parametrize(
    ("texts", "kwargs", "rows"),
    [
        (f"{V1}Q.", {"videos": [[WIDE, SQUARE]]}, [f"The first video: Frame-1: {A}Frame-2: {B}Q."]),
        (f"{V1}Q.", {"videos": [WIDE, SMALL]}, [f"The first video: Frame-1: {A}Frame-2: {S}Q."]),
        (
            f"{V1}Q.",
            {"videos": torch.zeros(2, 3, 28, 28)},
            [f"The first video: Frame-1: {S}Frame-2: {S}Q."],
        ),
        (
            f"{V1}Q.",
            {"videos": [[WIDE, SMALL]], "videos_kwargs": {"timestamps": [[0, 12.345]]}},
            [f"The first video: Frame-1-0.00s: {A}Frame-2-12.35s: {S}Q."],
        ),
        (
            f"{V1}Q.",
            {"videos": [[WIDE, SMALL]], "videos_kwargs": {"fps": [29.97], "timestamps": [[-1, -1]]}},
            [f"The first video sampled with 29.97 fps: Frame-1--1.00s: {A}Frame-2--1.00s: {S}Q."],
        ),
        (
            f"{V1}a{V2}b",
            {"videos": [[WIDE], np.zeros((1, 20, 20, 3), np.uint8)], "fps": [2, None]},
            [f"The first video sampled with 2.00 fps: Frame-1: {A}aThe second video: Frame-1: {S}b"],
        ),
        (
            f"<image-1>a{V1}b",
            {"images": [SQUARE], "videos": [[WIDE]], "fps": 4},
            [f"<image 1>{B}aThe first video sampled with 4.00 fps: Frame-1: {A}b"],
        ),
        (
            [f"{V1}a", f"<image-1>{V1}b"],
            {"images": [SMALL], "videos": [[WIDE], [SQUARE]], "timestamps": [[1.0], [2.0]]},
            [f"The first video: Frame-1-1.00s: {A}a", f"<image 1>{S}The first video: Frame-1-2.00s: {B}b"],
        ),
        (
            ["a", f"{V1}b"],
            {"videos": [[], [[WIDE, SMALL]]]},
            ["a", f"The first video: Frame-1: {A}Frame-2: {S}b"],
        ),
    ],
)
def test_videos(processor, texts, kwargs, rows):
    inputs = processor(text=texts, return_tensors="pt", **kwargs)
    assert shown(processor, inputs) == rows
    tokens = [int(h * w) // 4 for h, w in inputs["image_grid_hws"].tolist()]
    assert tokens == [int(run) for row in rows for run in re.findall(r"\*([0-9]+)", row)]


def test_videos_of_conversations(processor):
    video = {"type": "video", "video": [WIDE, SMALL]}
    plain, told = user(video, "Q"), user({**video, "fps": 2.0, "timestamps": [0.0, 0.5]}, image(SQUARE), "Q")
    inputs = processor.apply_chat_template([plain, told], tokenize=True, return_dict=True, padding=True)
    rows = shown(processor, inputs)
    assert f"user\nThe first video: Frame-1: {A}Frame-2: {S}Q" in rows[0]
    assert f"user\nThe first video sampled with 2.00 fps: Frame-1-0.00s: {A}Frame-2-0.50s: {S}<image 1>{B}Q" in rows[1]


def test_padding_is_as_the_tokenizers(processor):
    """Which is not asked to pad, but would do the same."""
    texts, tokenizer = ["a", "a b c", "a b"], processor.tokenizer
    for options in (
        {"padding": True},
        {"padding": "longest", "padding_side": "right"},
        {"padding": "max_length", "max_length": 2},
        {"padding": "max_length", "max_length": 9, "pad_to_multiple_of": 8},
        {"padding": True, "pad_to_multiple_of": 5},
        {"padding": False},
    ):
        expected = tokenizer(texts, **options)
        for tensors in (None, "pt", "np") if len(set(map(len, expected["input_ids"]))) == 1 else (None,):
            got = processor(text=texts, **options, return_tensors=tensors)
            for name in ("input_ids", "attention_mask"):
                rows = got[name] if tensors is None else got[name].tolist()
                assert rows == expected[name], (options, name)
    other = copy.deepcopy(processor)
    other.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="does not have a padding token"):
        other(text=texts, padding=True)


def test_threads_may_share_a_processor(processor):
    """Padded calls beside others: the tokenizer keeps no padding, which another thread would change."""
    texts, wrong = ["a", "a b c", "a b"], []
    calls = [{"padding": True, "return_tensors": "pt"}, {"padding": False}, {"padding": "max_length", "max_length": 9}]
    expected = [processor(text=texts, **call)["input_ids"] for call in calls]

    def ask(number):
        for turn in range(60):
            place = (turn + number) % 3
            try:
                got = processor(text=texts, **calls[place])["input_ids"]
                if not np.array_equal(got, expected[place]) if place != 1 else got != expected[place]:
                    wrong.append(got)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_padding(processor):
    texts = ["hello", "hello there, longer"]
    assert processor.tokenizer.padding_side == "left"
    inputs = processor(text=texts, return_tensors="pt")
    assert inputs["attention_mask"][0].tolist() == sorted(inputs["attention_mask"][0].tolist())
    assert isinstance(processor(text=texts)["input_ids"], list)
    assert len(processor(text=texts)["input_ids"][0]) < len(processor(text=texts)["input_ids"][1])
    arrays = processor(text=["<image-1>", "b"], images=[WIDE], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    right = processor(text=texts, return_tensors="pt", padding_side="right", return_offsets_mapping=True)
    assert right["attention_mask"][0, 0] == 1
    told = LocateAnythingProcessor(processor.image_processor, copy.deepcopy(processor.tokenizer))
    told.tokenizer.padding_side = "right"
    again = told(text=texts, return_tensors="pt", return_offsets_mapping=True)
    assert all(torch.equal(right[key], again[key]) for key in right)
    nested = processor(text=texts, text_kwargs={"padding": "max_length", "max_length": 40, "return_tensors": "pt"})
    assert nested["input_ids"].shape == (2, 40)
    multiple = processor(text=texts, padding=True, pad_to_multiple_of=16, return_tensors="pt", truncation=False)
    assert multiple["input_ids"].shape[1] % 16 == 0
    common = processor(text="<image-1>", images=WIDE, common_kwargs={"return_tensors": "pt"})
    assert common.to(dtype=torch.bfloat16)["pixel_values"].dtype == torch.bfloat16
    assert common.to(dtype=torch.bfloat16)["image_grid_hws"].dtype == torch.int64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "text"),
        ({"text": []}, "text"),
        ({"text": [["a"]]}, "text"),
        ({"text": "half of \ud83d"}, "text 0: holds half of a character"),
        ({"text": "<image-1>"}, "images: got 0; .* take"),
        ({"text": "a", "images": [WIDE]}, "images: got 1; .* take .*Write <image-1>"),
        ({"text": "<image-1>", "images": [WIDE, WIDE]}, "images: got 2; .* take"),
        ({"text": "<image-1><image-2>", "images": [WIDE]}, "images: got 1; .* take"),
        ({"text": "<image-2>", "images": [WIDE, WIDE]}, r"text 0: names images \[2\], but got 2"),
        ({"text": "<image-0><image-1>", "images": [WIDE]}, r"text 0: names images \[0, 1\], but got 1"),
        ({"text": ["<image-1>", "<image-1>"], "images": [WIDE]}, r"images: got 1; .* take \[1, 1\]"),
        ({"text": ["<image-1>", "<image-2>"], "images": [[WIDE], [WIDE]]}, r"text 1: names images \[2\], but got 1"),
        ({"text": ["<image-1>", "a"], "images": [[WIDE]]}, "got 1 lists for 2 texts"),
        ({"text": ["<image-1>", "a"], "images": [[WIDE], WIDE]}, "one list per text"),
        ({"text": ["<image-1>", "a"], "images": [[WIDE], [WIDE]]}, r"text 1: names images \[\], but got 1"),
        ({"text": "<image-1>", "images": ["no/such.png"]}, r"images\[0\]: .*no such file"),
        ({"text": ["<image-1>"], "images": [[Image.new("RGB", (7200, 20))]]}, r"images\[0\]\[0\]: .*7200×20"),
        ({"text": "<image-1> <IMG_CONTEXT>", "images": [WIDE]}, "text 0: holds 1 <IMG_CONTEXT>"),
        ({"text": "what is <IMG_CONTEXT>?"}, "text 0: holds 1 <IMG_CONTEXT>"),
        ({"text": "<video-1>"}, "videos: got 0; .* take"),
        ({"text": "a", "videos": [[WIDE]]}, "videos: got 1; .* take"),
        ({"text": "<video-1>", "videos": "clip.mp4"}, r"videos\[0\]: .*no video decoder"),
        ({"text": "<video-1>", "videos": {"frames": [WIDE]}}, r"videos\[0\]: .*frames"),
        ({"text": "<video-1>", "videos": [[WIDE]], "fps": [1, 2]}, "fps: .*a list of 1"),
        ({"text": "<video-1>", "videos": [[WIDE]], "timestamps": [[1, 2]]}, "timestamps: got 2 .* 1 frames"),
        ({"text": "<video-1>", "videos": [[WIDE]], "timestamps": 3}, "timestamps: .*a list of 1"),
        ({"text": "".join(f"<video-{i}>" for i in range(1, 12)), "videos": [[SMALL]] * 11}, "knows 10"),
        ({"text": "a", "truncation": True, "max_length": 3}, "truncation"),
        ({"text": "a", "text_kwargs": {"truncation": "longest_first"}}, "truncation"),
        ({"text": "a", "audio": [1]}, "audio"),
        ({"text": "a", "padding": "yes"}, "yes"),
        ({"text": ["a", "b c d"], "padding": False, "return_tensors": "pt"}, "Unable to create tensor"),
    ],
)
def test_refused_calls(processor, call, message):
    with pytest.raises(ValueError, match=message):
        processor(**call)


@pytest.mark.parametrize("call", [{"do_resize": True}, {"images_kwargs": {"size": 3}}, {"videos_kwargs": {"x": 1}}])
def test_unknown_keywords(processor, call):
    name = next(iter(next(iter(call.values())))) if isinstance(next(iter(call.values())), dict) else "do_resize"
    with pytest.raises(TypeError, match=f"unknown keyword {name}"):
        processor(text="a", **call)


def test_arguments_are_not_changed(processor):
    texts, images, nested = ["<image-1>", "<image-1>"], [WIDE, SMALL], {"timestamps": None}
    processor(text=texts, images=images, videos_kwargs=nested)
    assert (texts, images, nested) == (["<image-1>", "<image-1>"], [WIDE, SMALL], {"timestamps": None})
    conversation = user({"type": "image_url", "image_url": {"url": WIDE}}, text("Q"))
    before = json.dumps(conversation, default=str)
    processor.apply_chat_template(conversation, tokenize=True)
    assert json.dumps(conversation, default=str) == before


def test_a_tokenizer_that_swallows_slots_is_noticed(processor):
    odd = copy.deepcopy(processor)
    odd.tokenizer.add_tokens(["<img><IMG_CONTEXT>"], special_tokens=True)
    with pytest.raises(ValueError, match=r"image.* token count"):
        odd(text="<image-1>What?", images=[WIDE])


# ---------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint's data files, the processor's code and the auto_map that names it."""
    folder = tmp_path_factory.mktemp("processor-only")
    for file in CHECKPOINTS["shapes"].iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    for path in remote_code_files():
        shutil.copy(path, folder)
    maps = {
        "AutoImageProcessor": "processing.LocateAnythingImageProcessor",
        "AutoProcessor": "processing.LocateAnythingProcessor",
    }
    wanted = {
        "preprocessor_config.json": maps,
        "processor_config.json": maps,
        "config.json": {"AutoConfig": "configuration.LocateAnythingConfig"},
    }
    for name, auto_map in wanted.items():
        write(folder / name, {**json.loads((folder / name).read_text()), "auto_map": auto_map})
    return folder


def write(path, settings: dict) -> None:
    path.unlink()
    path.write_text(json.dumps(settings))


def load(auto: str, folder):
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)


def test_auto_classes(folder, processor):
    loaded = load("AutoProcessor", folder)
    assert type(loaded).__name__ == "LocateAnythingProcessor"
    assert type(loaded).__module__.startswith("transformers_modules.")
    assert type(load("AutoImageProcessor", folder)).__name__ == "LocateAnythingImageProcessor"
    assert load("AutoTokenizer", folder).get_vocab() == loaded.tokenizer.get_vocab()
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.image_token_id == loaded.video_token_id == 420
    assert {*loaded.model_input_names} == {"input_ids", "attention_mask", "pixel_values", "image_grid_hws"}
    conversation = user(image(), text(processor.build_question("detect", ["red circle", "blue square"])))
    call = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    ours, theirs = (p.apply_chat_template(conversation, **call) for p in (processor, loaded))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_round_trip(folder, tmp_path):
    loaded = load("AutoProcessor", folder)
    loaded.image_processor.in_token_limit = 64
    loaded.save_pretrained(tmp_path)
    again = load("AutoProcessor", tmp_path)
    assert again.image_processor.in_token_limit == 64
    settings = {name: value for name, value in loaded.to_dict().items() if name not in ("auto_map", "image_processor")}
    assert settings.items() <= again.to_dict().items()
    call = {"text": ["<image-1>a", "b"], "images": [Image.new("RGB", (400, 300))], "return_tensors": "pt"}
    first, second = loaded(**call), again(**call)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert load("AutoImageProcessor", tmp_path).in_token_limit == 64


SAVED = {
    # what each line's `save_pretrained` leaves: (files gone, settings of the tokenizer)
    "4.57": ([], {"additional_special_tokens": [], "extra_special_tokens": {}}),
    "5.x": (
        ["preprocessor_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"],
        {"extra_special_tokens": [], "backend": "tokenizers", "is_local": True},
    ),
    "5.x with extra tokens": (
        ["preprocessor_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"],
        {"extra_special_tokens": ["<ref>", "</ref>", "<box>", "</box>"]},
    ),
}


@pytest.mark.parametrize("line", SAVED)
def test_what_another_line_saved_is_loaded(folder, processor, tmp_path, line):
    """transformers 5 writes one processor_config.json with the image processor in it, and a list of extra tokens."""
    saved = shutil.copytree(folder, tmp_path / "saved")
    gone, settings = SAVED[line]
    tokenizer = json.loads((saved / "tokenizer_config.json").read_text())
    if gone:
        tokenizer = {
            name: tokenizer[name] for name in ("eos_token", "pad_token", "model_max_length", "tokenizer_class")
        }
        both = json.loads((saved / "processor_config.json").read_text())
        both["image_processor"] = {
            **json.loads((saved / "preprocessor_config.json").read_text()),
            "in_token_limit": 64,
        }
        write(saved / "processor_config.json", both)
    write(saved / "tokenizer_config.json", {**tokenizer, **settings})
    for name in gone:
        (saved / name).unlink()
    again = load("AutoProcessor", saved)
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.image_processor.in_token_limit == (64 if gone else 25600)
    call = {"text": ["<image-1>a<ref>x</ref>", "b"], "images": [WIDE], "return_tensors": "pt"}
    first, second = processor(**call), again(**call)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("options", [{}, pytest.param({"use_fast": True}, marks=pytest.mark.slow)])
def test_nothing_is_said_on_load(folder, options):
    """In a process of its own, since transformers says some things once. The evaluation scripts pass use_fast=True."""
    script = "import sys, transformers\ntransformers.AutoProcessor.from_pretrained(sys.argv[1], **eval(sys.argv[2]))"
    options = {"trust_remote_code": True, **options}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(folder), str(options)],
        capture_output=True,
        text=True,
        check=False,
    )
    # the caller's, and torchao's where it is installed
    let_be = ("`use_fast` parameter is deprecated", "torchao", "_pytree.py", "warnings.warn")
    said = [line for line in run.stderr.splitlines() if line.strip() and not any(map(line.__contains__, let_be))]
    assert run.returncode == 0 and run.stdout == "" and said == [], run.stderr


def test_a_tokenizer_of_another_model_is_refused(processor, monkeypatch):
    other = copy.deepcopy(processor.tokenizer)
    monkeypatch.setattr(other, "get_added_vocab", lambda: {"<|im_start|>": 1, "<|im_end|>": 2})
    with pytest.raises(ValueError, match="tokenizer: has no token '<IMG_CONTEXT>'"):
        LocateAnythingProcessor(processor.image_processor, other)
