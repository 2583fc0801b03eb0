"""Equality with the recorded answers of the stock model's own `generate`, float32."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import StoppingCriteria

from tests.conftest import CHECKPOINTS, RECIPE, Batch, cases_of, model_of, tokenizer_of

CASES = [(name, index) for name in ("shapes", "shapes-early") for index in range(len(cases_of(name)))]


def in_chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@pytest.mark.parametrize("chunk", in_chunks(CASES, 50), ids=lambda chunk: f"{chunk[0][0]}-{chunk[0][1]}")
def test_a_lone_row_answers_and_counts_as_the_stock_did(chunk):
    for name, index in chunk:
        case = cases_of(name)[index]
        batch = Batch(name, [case])
        settings = {key: case[key] for key in RECIPE if key in case}
        if "seed" in case:
            torch.manual_seed(case["seed"])
        output = batch.model.generate(
            **batch.inputs,
            generation_mode=case["generation_mode"],
            max_new_tokens=case["max_new_tokens"],
            return_dict_in_generate=True,
            **settings,
        )
        assert batch.answers(output) == batch.expected(), (name, index)
        assert output.row_forwards.tolist() == [case["forward_step"]], (name, index)


@pytest.mark.parametrize("seed", range(3))
def test_a_random_batch_answers_as_its_rows_alone(golden, seed):
    rng = random.Random(f"{golden} {seed}")
    cases = rng.choices(cases_of(golden), k=rng.choice([2, 3, 5, 8, 13, 24]))
    batch = Batch(golden, cases, extra_padding=rng.choice([0, 0, 7]))
    output = batch.run(max_batch_rows=rng.choice([None, 1, 3, 7]))
    assert batch.answers(output) == batch.expected()
    assert output.row_forwards.tolist() == [case["forward_step"] for case in cases]


def test_every_case_in_one_call_with_few_slots(golden):
    cases = [case for case in cases_of(golden) if "seed" not in case]
    batch = Batch(golden, cases)
    assert batch.answers(batch.run(max_batch_rows=16)) == batch.expected()


class CharacterTokenizer:
    """Decodes ids as the checkpoint's tokenizer does, with the limit of a script's tokenizer."""

    def __init__(self, tokenizer, model_max_length):
        self.tokenizer, self.model_max_length = tokenizer, model_max_length

    def decode(self, ids, **kwargs):
        return self.tokenizer.decode(ids, **kwargs)


@pytest.fixture
def tokenizer():
    return tokenizer_of("shapes")


def test_the_stock_call_gives_the_stock_text_and_statistics(golden, tokenizer):
    cases = cases_of(golden)[:40]
    for case in cases:
        batch = Batch(golden, [case])
        settings = {key: case[key] for key in RECIPE if key in case}
        torch.manual_seed(case.get("seed", 0))
        text, history, statistics = batch.model.generate(
            **batch.inputs,
            tokenizer=tokenizer,
            generation_mode=case["generation_mode"],
            max_new_tokens=case["max_new_tokens"],
            use_cache=True,
            do_sample=True,
            verbose=True,
            **settings,
        )
        assert text == case["output"]
        assert "".join(piece for _, piece in history) == text
        assert len(history) == case["forward_step"]
        for name in ("num_tokens", "forward_step", "num_boxes", "switch_to_ar"):
            assert f"{name}={case[name]};" in statistics + ";"


def test_the_stock_call_gives_one_text_a_row(golden, tokenizer):
    cases = [case for case in cases_of(golden) if "seed" not in case][:6]
    batch = Batch(golden, cases)
    settings = {key: value for key, value in batch.settings.items() if key not in ("top_p", "top_k")}
    texts = batch.model.generate(**batch.inputs, tokenizer=tokenizer, **settings)
    assert texts == [case["output"] for case in cases]


def test_the_tokenizers_length_bounds_a_stock_call(tokenizer):
    case = next(case for case in cases_of("shapes") if case["generation_mode"] == "slow" and case["num_tokens"] > 15)
    batch = Batch("shapes", [case])
    short = CharacterTokenizer(tokenizer, len(case["input_ids"]) + 5)
    text = batch.model.generate(**batch.inputs, tokenizer=short, generation_mode="slow", max_new_tokens=256)
    assert text == tokenizer.decode(case["output_ids"][:5])
    with pytest.raises(ValueError, match="at or over the length limit"):
        batch.model.generate(**batch.inputs, tokenizer=CharacterTokenizer(tokenizer, len(case["input_ids"])))


OURS = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")  # none of our making


@OURS
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_passes_through_transformers_own_attention(checkpointing):
    from locateanything.modeling_locateanything_batched import LocateAnythingForConditionalGeneration

    model = LocateAnythingForConditionalGeneration.from_pretrained(CHECKPOINTS["shapes"]).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    batch = Batch("shapes", cases_of("shapes")[:1])
    model(**batch.inputs, labels=batch.input_ids).loss.backward()
    assert all(layer.self_attn.q_proj.weight.grad.any() for layer in model.language_model.model.layers)


@OURS
def test_the_plain_models_own_generate_is_slow_mode():
    """transformers' generate on the base class, with DynamicCache and dense masks, is an independent witness."""
    from locateanything.modeling_locateanything_batched import LocateAnythingForConditionalGeneration

    model = LocateAnythingForConditionalGeneration.from_pretrained(CHECKPOINTS["shapes"]).eval()
    cases = [
        case
        for case in cases_of("shapes")
        if case["generation_mode"] == "slow" and case["max_new_tokens"] == 256 and case["num_tokens"] < 60
        if not any(key in case for key in RECIPE)
    ][:8]
    batch = Batch("shapes", cases)
    pad = model.config.pad_token_id
    output = model.generate(**batch.inputs, max_new_tokens=64, do_sample=False, pad_token_id=pad)
    assert batch.answers(output) == [case["output_ids"] for case in cases]


def test_eager_attention_gives_the_same_answers(golden):
    from locateanything.modeling_locateanything_batched import LocateAnythingBatchedForConditionalGeneration

    model = LocateAnythingBatchedForConditionalGeneration.from_pretrained(
        CHECKPOINTS[golden], attn_implementation="eager"
    ).eval()
    cases = random.Random(golden).sample(cases_of(golden), 16)
    batch = Batch(golden, cases)
    batch.model = model
    assert batch.answers(batch.run()) == batch.expected()
    assert model_of(golden).config._attn_implementation == "sdpa"


def test_each_row_tells_why_it_ended():
    fast = [case for case in cases_of("shapes") if case["generation_mode"] == "fast" and case["num_boxes"] > 1]
    cases = list({case["case"]: case for case in fast if not set(case) & {"seed", *RECIPE}}.values())
    batch = Batch("shapes", cases[:5])
    features = batch.model.extract_feature(batch.inputs.pop("pixel_values"), batch.inputs.pop("image_grid_hws"))
    features[4] = features[4] * float("nan")
    batch.inputs["visual_features"] = features
    asked = []

    class Cuts(StoppingCriteria):
        def answer_to_keep(self, answer):
            asked.append(answer[-1])
            return 2 if answer == cases[3]["output_ids"][: len(answer)] else None

    def stops(input_ids, scores):
        return input_ids[0].tolist() == cases[2]["input_ids"] + cases[2]["output_ids"][:4]

    output = batch.run(max_new_tokens=[99, 3, 99, 99, 99], stopping_criteria=[stops, Cuts()])
    assert output.finish_reasons == ["end", "limit", "stop", "repetition", "error"]
    answers = output.sequences[:, batch.input_ids.shape[1] :].tolist()
    assert answers[0][: len(cases[0]["output_ids"])] == cases[0]["output_ids"]
    pad = batch.model.config.pad_token_id
    for row, kept in ((2, 4), (3, 2), (4, 0)):
        assert answers[row][: kept + 1] == [*cases[row]["output_ids"][:kept], pad]
    assert set(asked) == {batch.model.config.token_roles.box_end}, "it is not asked where no box can repeat"
