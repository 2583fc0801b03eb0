"""What transformers expects of any model, and what the stock's fine-tuning scripts call."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from transformers import DynamicCache, Qwen2ForCausalLM

from locateanything.configuration import LocateAnythingConfig
from locateanything.modeling_locateanything_batched import (
    LocateAnythingBatchedForConditionalGeneration,
    LocateAnythingForConditionalGeneration,
)
from tests.conftest import CHECKPOINTS, STOCK_CONFIGURATION, Batch, cases_of


def load(**kwargs) -> LocateAnythingBatchedForConditionalGeneration:
    return LocateAnythingBatchedForConditionalGeneration.from_pretrained(CHECKPOINTS["shapes"], **kwargs).eval()


@pytest.fixture
def batch() -> Batch:
    return Batch("shapes", [case for case in cases_of("shapes") if "seed" not in case][:5])


@pytest.fixture
def one() -> Batch:
    return Batch("shapes", cases_of("shapes")[:1])


def checkpointing(model, **kwargs) -> None:
    """By the name of the release: 5.24 has another one and deprecates the old."""
    new = getattr(model, "activation_checkpointing_enable", None)
    new(kwargs) if new is not None else model.gradient_checkpointing_enable(kwargs)


# ---- transformers' common checks


def test_forward_train_and_save_without_a_warning(tmp_path, batch):
    """On both lines: no deprecation of ours, in loading, a forward, a step, answers and saving."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load()
        model(**batch.inputs, labels=batch.input_ids).loss.backward()
        model.generate(**batch.inputs, max_new_tokens=3)
        LocateAnythingForConditionalGeneration.generate.__get__(model)(**batch.inputs, max_new_tokens=2)
        model.save_pretrained(tmp_path)
        LocateAnythingBatchedForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_reaches_both_towers_and_changes_no_gradient(one, reentrant):
    model = load().train()
    model(**one.inputs, labels=one.input_ids).loss.backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    checkpointing(model, use_reentrant=reentrant)
    layers = [*model.language_model.model.layers, *model.vision_model.encoder.blocks]
    assert all(layer.gradient_checkpointing for layer in layers)
    entered = []
    for layer in layers:  # a second time on the way back
        layer.norm = layer.norm0 if hasattr(layer, "norm0") else layer.input_layernorm
        layer.norm.register_forward_hook(lambda module, *_: entered.append(module))
    model(**one.inputs, labels=one.input_ids).loss.backward()
    assert len(entered) == 2 * len(layers)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], msg=name)


def test_embeddings_are_resized_and_stay_tied(one):
    model = load()
    size = model.config.text_config.vocab_size
    before = model(**one.inputs).logits
    model.resize_token_embeddings(size + 8)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.text_config.vocab_size == size + 8 == model.get_input_embeddings().num_embeddings
    torch.testing.assert_close(model(**one.inputs).logits[..., :size], before)


@pytest.mark.slow
def test_forward_compiles(one):
    """A graph break or two are no failure; other numbers are."""
    model = load()
    features = model.extract_feature(one.inputs["pixel_values"], one.inputs["image_grid_hws"])
    inputs = {"input_ids": one.input_ids, "visual_features": features}
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
        torch.testing.assert_close(compiled(**one.inputs).logits, model(**one.inputs).logits)


def test_a_device_map(batch, tmp_path):
    """`auto`, and parts that accelerate keeps elsewhere and fetches for each call."""
    batch.model = load(device_map="auto")
    assert batch.answers(batch.run()) == batch.expected()
    inner = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2", "layers.3")
    device_map = {"mlp1": "cpu", "language_model.lm_head": "cpu"} | {f"language_model.model.{x}": "cpu" for x in inner}
    device_map |= dict.fromkeys(("vision_model", "language_model.model.layers.1"), "disk")
    batch.model = load(device_map=device_map, offload_folder=tmp_path)
    assert batch.model.language_model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert batch.answers(batch.run()) == batch.expected()


def test_the_plain_models_own_generate():
    cases = [case for case in cases_of("shapes") if case["generation_mode"] == "slow" and "seed" not in case]
    cases = [case for case in cases if "repetition_penalty" not in case and case["num_tokens"] > 6][:3]
    model = LocateAnythingForConditionalGeneration.from_pretrained(CHECKPOINTS["shapes"]).eval()

    def ask(**settings) -> list[list[int]]:
        batch = Batch("shapes", cases)
        output = model.generate(**batch.inputs, max_new_tokens=6, **settings)
        return output[:, batch.input_ids.shape[1] :].tolist()

    expected = [case["output_ids"][:6] for case in cases]
    assert ask(do_sample=False) == ask(do_sample=False, use_cache=False) == expected
    name = "cache" if "cache" in inspect.signature(Qwen2ForCausalLM.forward).parameters else "past_key_values"
    assert ask(do_sample=False, use_cache=True, **{name: DynamicCache()}) == expected
    for several in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(ValueError, match="2 answers or beams a row"):
            ask(**several)


# ---- the stock's scripts


def test_nothing_that_feeds_an_image_is_dropped(one):
    model = load()
    pixels, grids = one.inputs["pixel_values"], one.inputs["image_grid_hws"]
    expected = model(**one.inputs).logits
    features = torch.cat(model.get_image_features(pixels, grids))
    told = {"visual_features": features, "image_token_index": model.image_token_index}
    torch.testing.assert_close(model.language_model(input_ids=one.input_ids, **told).logits, expected)
    assert not torch.allclose(model.language_model(input_ids=one.input_ids).logits, expected)
    with pytest.raises(ValueError, match="20 image slots, but the images give 19"):
        model.language_model(input_ids=one.input_ids, **{**told, "visual_features": features[1:]})
    for unknown in ("pixel_value", "image_sizes", "loss_weight"):
        with pytest.raises(ValueError, match=f"{unknown}, which would have no effect"):
            model(input_ids=one.input_ids[:, -3:], **{unknown: pixels})
    with pytest.raises(ValueError, match="inputs_embeds show theirs already"):
        model(inputs_embeds=torch.zeros(1, 3, 128), pixel_values=pixels, image_grid_hws=grids)


def test_image_flags_say_which_images_count(batch):
    """The stock's collator gives a row without a picture a dummy one, and flags it 0."""
    model = load().train()
    pixels, grids = batch.inputs["pixel_values"], batch.inputs["image_grid_hws"]
    flags = [len(case["images"]) for case in batch.cases]
    expected = model(**batch.inputs, labels=batch.input_ids)
    told = model(**batch.inputs, labels=batch.input_ids, image_flags=torch.tensor(flags))
    assert torch.equal(told.logits, expected.logits)

    dummy = torch.zeros(4, 3, 14, 14)
    with_dummy = {
        "pixel_values": torch.cat([dummy, pixels]),
        "image_grid_hws": torch.tensor([[2, 2], *grids.tolist()]),
    }
    told = model(**{**batch.inputs, **with_dummy}, image_flags=[[0], *[[flag] for flag in flags]])
    torch.testing.assert_close(told.logits, expected.logits)
    with pytest.raises(ValueError, match=r"image_flags \[1\] tell of 1 images; there are"):
        model(**{**batch.inputs, **with_dummy}, image_flags=[1])

    # a step of rows without pictures: every parameter has a gradient, as in the other processes of a distributed run
    words = torch.full((1, 4), 5)
    only = {"pixel_values": dummy, "image_grid_hws": torch.tensor([[2, 2]])}
    model(input_ids=words, labels=words, image_flags=torch.tensor([0]), **only).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


class LoraConfig:
    def __init__(self, **options):
        self.options = options


class LoraModel(nn.Module):
    """As much of peft's wrapper as is seen from outside: names, what it passes on, and a change to the numbers."""

    def __init__(self, model: nn.Module, config: LoraConfig):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model, self.config_given = model, config
        self.lora = nn.Parameter(torch.ones(()))
        self.wrapped = [
            name for name, _ in model.named_modules() if name.endswith(tuple(config.options["target_modules"]))
        ]
        for name in self.wrapped:
            model.get_submodule(name).register_forward_hook(lambda module, args, output: output * self.lora)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def forward(self, *args, **kwargs):
        return self.base_model.model.forward(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model").model, name)


@pytest.fixture
def peft(monkeypatch):
    module = types.ModuleType("peft")
    module.LoraConfig, module.get_peft_model = LoraConfig, LoraModel
    monkeypatch.setitem(sys.modules, "peft", module)


def test_lora_by_the_stocks_calls(peft, batch):
    model = load()
    batch.model = model
    model.wrap_llm_lora(r=4, lora_alpha=8)
    model.wrap_backbone_lora(r=2)
    layers, blocks = len(model.get_decoder().layers), len(model.vision_model.encoder.blocks)
    assert len(model.language_model.wrapped) == 7 * layers and len(model.vision_model.wrapped) == blocks
    assert model.language_model.config_given.options["r"] == 4
    assert model.language_model.config_given.options["lora_dropout"] == 0.05
    assert batch.answers(batch.run()) == batch.expected()
    model.train()(
        **batch.inputs, labels=batch.input_ids, image_flags=[len(c["images"]) for c in batch.cases]
    ).loss.backward()
    assert model.language_model.lora.grad is not None and model.vision_model.lora.grad is not None
    with torch.no_grad():
        model.language_model.lora.mul_(0.5)
    assert batch.run().sequences.tolist() != batch.run(max_new_tokens=1).sequences.tolist()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_checkpoint_with_adapters_is_made_with_adapters(peft):
    config = LocateAnythingConfig.from_pretrained(CHECKPOINTS["shapes"], use_llm_lora=4, use_backbone_lora=2)
    model = LocateAnythingForConditionalGeneration(config)
    assert model.language_model.config_given.options["lora_alpha"] == 8
    assert any(name.startswith("language_model.base_model.model.lm_head") for name in model.state_dict())
    named = set(model._tied_weights_keys) | set(getattr(model, "all_tied_weights_keys", ()))
    assert named == {"language_model.base_model.model.lm_head.weight"} <= set(model.state_dict())


def test_lora_without_peft_names_it(monkeypatch, shapes):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        copy.copy(shapes).wrap_llm_lora(r=4)


def test_the_switched_class_takes_the_stocks_config_and_batches(tmp_path):
    """As after a pull request: AutoConfig is the stock's own class, its processor pads on the right."""
    from transformers import AutoModel

    from upload_to_hub import assemble

    folder = assemble(CHECKPOINTS["shapes"], tmp_path / "repository")
    (folder / "configuration_locateanything.py").write_text(STOCK_CONFIGURATION)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "configuration_locateanything.LocateAnythingConfig"
    config["_attn_implementation"] = "magi"
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model.config).__module__.endswith("configuration_locateanything")
    assert model.language_model.config._attn_implementation == "sdpa"

    batch = Batch("shapes", [case for case in cases_of("shapes") if "seed" not in case][:6])
    order = (batch.attention_mask == 0).long().argsort(dim=1, stable=True)
    right = {
        "input_ids": batch.input_ids.gather(1, order),
        "attention_mask": batch.attention_mask.gather(1, order),
        "pixel_values": batch.inputs["pixel_values"],
        "image_grid_hws": batch.inputs["image_grid_hws"].numpy(),
    }
    output = model.generate(**right, **batch.settings, return_dict_in_generate=True)
    assert batch.answers(output) == batch.expected()
    model.generate(**{**right, "pixel_values": right["pixel_values"].bfloat16()}, max_new_tokens=2)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
