"""The drop-in as its users load it: an assembled folder, the Auto classes, the model card's script, the pipeline."""

from __future__ import annotations

import pickle

import pytest
import torch
import transformers
from PIL import Image
from transformers import pipeline

from tests.conftest import CHECKPOINTS, GOLDENS, cases_of

IMAGES = GOLDENS / "shapes" / "images"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    from upload_to_hub import assemble

    return str(assemble(CHECKPOINTS["shapes"], tmp_path_factory.mktemp("assembled") / "drop-in"))


def load(auto: str, folder: str, **kwargs):
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **kwargs)


@pytest.fixture(scope="module")
def model(folder):
    return load("AutoModel", folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return load("AutoProcessor", folder)


def simple_cases(count: int, mode: str = "hybrid") -> list[dict]:
    """Greedy cases with one picture, one for each question."""
    cases = [
        case
        for case in cases_of("shapes")
        if case["generation_mode"] == mode and case["layout"] == "image-question" and case["max_new_tokens"] == 256
        if "seed" not in case and "repetition_penalty" not in case and case["num_tokens"] < 100
    ]
    return cases[:count]


def conversation(case: dict) -> list[dict]:
    image = Image.open(IMAGES / case["images"][0])
    content = [{"type": "image", "image": image}, {"type": "text", "text": case["question"]}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"])
def test_every_auto_model_gives_the_batched_class(folder, auto):
    model = load(auto, folder)
    assert type(model).__name__ == "LocateAnythingBatchedForConditionalGeneration"
    assert type(model.config).__name__ == "LocateAnythingConfig"


def test_a_loaded_model_pickles(model):
    """To a spawned worker, or by torch.save: its class is the module's own, not one that transformers made of it."""
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_other_auto_classes(folder, processor):
    assert type(load("AutoConfig", folder)).__name__ == "LocateAnythingConfig"
    assert type(load("AutoImageProcessor", folder)).__name__ == "LocateAnythingImageProcessor"
    assert type(processor).__name__ == "LocateAnythingProcessor"
    tokenizer = load("AutoTokenizer", folder)
    assert tokenizer.convert_tokens_to_ids("<box>") == 423
    assert tokenizer("<ref>red circle</ref>").input_ids == processor.tokenizer("<ref>red circle</ref>").input_ids


def test_transformers_own_way(model, processor):
    """apply_chat_template on a batch, generate, decode, ground."""
    cases = simple_cases(8)
    inputs = processor.apply_chat_template(
        [conversation(case) for case in cases],
        add_generation_prompt=True,
        tokenize=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    for ids, mask, case in zip(inputs["input_ids"], inputs["attention_mask"], cases, strict=True):
        assert ids[mask.bool()].tolist() == case["input_ids"]
    output = model.generate(**inputs)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    pad = processor.tokenizer.pad_token
    assert [answer.replace(pad, "") for answer in answers] == [case["output"] for case in cases]

    sizes = [Image.open(IMAGES / case["images"][0]).size[::-1] for case in cases]
    for found, case, (height, width) in zip(
        processor.post_process_grounding(output, target_sizes=sizes), cases, sizes, strict=True
    ):
        assert len(found["boxes"]) + len(found["points"]) == case["output"].count("</box>") - case["output"].count(
            "none"
        )
        assert len(found["labels"]) == len(found["boxes"])
        if len(found["boxes"]):
            assert found["boxes"][:, 2].max() <= width and found["boxes"][:, 3].max() <= height


def test_the_model_cards_script(folder):
    """The published card's calls, names and order, unchanged."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModel.from_pretrained(folder, torch_dtype=torch.float32, trust_remote_code=True)
    model = model.to("cpu").eval()
    for case in simple_cases(3):
        messages = conversation(case)
        text = processor.py_apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images, videos = processor.process_vision_info(messages)
        inputs = processor(text=[text], images=images, videos=videos, return_tensors="pt").to("cpu")
        response = model.generate(
            pixel_values=inputs["pixel_values"].to(torch.float32),
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            image_grid_hws=inputs.get("image_grid_hws", None),
            tokenizer=tokenizer,
            max_new_tokens=2048,
            use_cache=True,
            generation_mode="hybrid",
            temperature=0.0,
            do_sample=True,
            top_p=1.0,
            repetition_penalty=1.0,
            verbose=True,
        )
        assert isinstance(response, tuple) and response[0] == case["output"]


def test_the_calls_of_the_evaluation_scripts(folder):
    """One picture at a time, as the official evaluation and the workers around it ask; seen to run on both lines."""
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True, use_fast=True)
    processor.tokenizer.padding_side = "left"
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    for case in simple_cases(2):
        messages = conversation(case)
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images, videos = processor.process_vision_info(messages)
        inputs = processor(text=[prompt], images=images, videos=videos, return_tensors="pt", padding=True)
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_hws")
        asked = {"max_new_tokens": 256, "use_cache": True, "generation_mode": "hybrid", "n_future_tokens": 6}
        sampling = {"do_sample": True, "temperature": 0.0, "top_p": 0.9, "repetition_penalty": 1.0}
        tokenizer = processor.tokenizer
        with torch.inference_mode():
            answer = model.generate(
                **{name: inputs[name] for name in names},
                **asked,
                **sampling,
                tokenizer=tokenizer,
                eos_token_id=tokenizer.eos_token_id,
            )
            ids = model.generate(**inputs, **asked, **sampling)
        assert answer == case["output"]
        # the stock's ids are decoded by hand
        new = ids[:, inputs["input_ids"].shape[1] :].cpu()
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        assert processor.post_process_image_text_to_text(new, **options) == [case["output"]]
        # an answer behind its prompt, to ask for its probabilities
        full = processor(text=[f"{prompt}{answer}\n"], images=images, videos=videos, return_tensors="pt")["input_ids"]
        assert full[0, : ids.shape[1]].tolist() == ids[0].tolist()


def without_end(case: dict) -> str:
    return case["output"].removesuffix("<|im_end|>")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_pipeline_with_chats(folder, batch_size):
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    cases = simple_cases(6)
    answers = pipe(
        [conversation(case) for case in cases], batch_size=batch_size, return_full_text=False, max_new_tokens=256
    )
    answers = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    assert [answer["generated_text"] for answer in answers] == [without_end(case) for case in cases]


def test_the_pipeline_with_prompts_and_images(folder, processor):
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    cases = simple_cases(3)
    texts = [processor.py_apply_chat_template(conversation(case), add_generation_prompt=True) for case in cases]
    images = [Image.open(IMAGES / case["images"][0]) for case in cases]
    answers = pipe(images=images, text=texts, return_full_text=False, max_new_tokens=256)
    answers = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    assert [answer["generated_text"] for answer in answers] == [without_end(case) for case in cases]
