"""The model as transformers sees it: names, shapes, loading, saving, dtypes, forward."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from locateanything.configuration import LocateAnythingConfig
from locateanything.modeling_locateanything_batched import (
    LocateAnythingBatchedForConditionalGeneration,
    LocateAnythingForConditionalGeneration,
)
from tests.conftest import CHECKPOINTS, GOLDENS, Batch, cases_of, pixels_of


def published_shapes() -> dict[str, list[int]]:
    """The 770 tensors of nvidia/LocateAnything-3B, from docs/checkpoint.md's table."""
    shapes = {
        "vision_model.patch_embed.proj.weight": [1152, 3, 14, 14],
        "vision_model.patch_embed.proj.bias": [1152],
        "vision_model.patch_embed.pos_emb.weight": [64, 64, 1152],
        "vision_model.encoder.final_layernorm.weight": [1152],
        "vision_model.encoder.final_layernorm.bias": [1152],
        "mlp1.0.weight": [4608],
        "mlp1.0.bias": [4608],
        "mlp1.1.weight": [2048, 4608],
        "mlp1.1.bias": [2048],
        "mlp1.3.weight": [2048, 2048],
        "mlp1.3.bias": [2048],
        "language_model.model.embed_tokens.weight": [152681, 2048],
        "language_model.model.norm.weight": [2048],
        "language_model.lm_head.weight": [152681, 2048],
    }
    block = {"norm0": [1152], "norm1": [1152], "wqkv": [3456, 1152], "wo": [1152, 1152]}
    block |= {"mlp.fc0": [4304, 1152], "mlp.fc1": [1152, 4304]}
    for number in range(27):
        for name, shape in block.items():
            shapes[f"vision_model.encoder.blocks.{number}.{name}.weight"] = shape
            shapes[f"vision_model.encoder.blocks.{number}.{name}.bias"] = shape[:1]
    layer = {"self_attn.q_proj": [2048, 2048], "self_attn.k_proj": [256, 2048], "self_attn.v_proj": [256, 2048]}
    plain = {"self_attn.o_proj": [2048, 2048], "mlp.gate_proj": [11008, 2048], "mlp.up_proj": [11008, 2048]}
    plain |= {"mlp.down_proj": [2048, 11008], "input_layernorm": [2048], "post_attention_layernorm": [2048]}
    for number in range(36):
        for name, shape in (layer | plain).items():
            shapes[f"language_model.model.layers.{number}.{name}.weight"] = shape
            if name in layer:
                shapes[f"language_model.model.layers.{number}.{name}.bias"] = shape[:1]
    return shapes


def test_the_3b_config_has_the_published_tensors():
    with torch.device("meta"):
        model = LocateAnythingBatchedForConditionalGeneration(LocateAnythingConfig())
    assert len(model.state_dict()) == 770
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published_shapes()
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "cls", [LocateAnythingForConditionalGeneration, LocateAnythingBatchedForConditionalGeneration]
)
def test_the_official_format_loads_whole(golden, cls):
    model, info = cls.from_pretrained(CHECKPOINTS[golden], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.language_model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    with safe_open(CHECKPOINTS[golden] / "model.safetensors", "pt") as file:
        state = model.state_dict()
        assert set(file.keys()) | {"language_model.lm_head.weight"} == set(state)
        for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
            assert torch.equal(file.get_tensor(name), state[name]), name


def test_projected_features_equal_the_goldens(golden):
    model = Batch(golden, cases_of(golden)[:1]).model
    for number in range(3):
        recorded = load_file(GOLDENS / golden / f"tensors_{number:03d}.safetensors")
        pixels, grid = pixels_of(golden, f"{number:03d}.png")
        assert torch.equal(pixels, recorded["pixel_values"])
        (features,) = model.get_image_features(pixels, torch.tensor([grid]))
        torch.testing.assert_close(features, recorded["projected_image_features"], atol=2e-5, rtol=1e-5)


def test_saving_and_loading_round_trips(shapes, tmp_path):
    shapes.save_pretrained(tmp_path)
    model, info = type(shapes).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.to_dict().keys() == shapes.config.to_dict().keys()
    batch = Batch("shapes", cases_of("shapes")[:6])
    batch.model = model
    assert batch.answers(batch.run()) == batch.expected()


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_runs(argument, dtype):
    model = LocateAnythingBatchedForConditionalGeneration.from_pretrained(CHECKPOINTS["shapes"], **{argument: dtype})
    assert {p.dtype for p in model.parameters()} == {dtype}
    cases = [case for case in cases_of("shapes") if "seed" not in case and case["max_new_tokens"] == 256][:8]
    batch = Batch("shapes", cases)
    batch.model = model.eval()
    new = batch.run(max_new_tokens=12).sequences[:, batch.input_ids.shape[1] :]
    same = sum(row[0] == case["output_ids"][0] for row, case in zip(new.tolist(), cases, strict=True))
    assert same >= 7, "the first token is far from a tie in these rows"


def test_layers_offloaded_by_accelerate():
    """Hooks move weights in and out around every module call, so calls must go through the modules."""
    from accelerate import cpu_offload

    model = LocateAnythingBatchedForConditionalGeneration.from_pretrained(CHECKPOINTS["shapes"]).eval()
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.language_model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    batch = Batch("shapes", [case for case in cases_of("shapes") if "seed" not in case][:5])
    batch.model = model
    assert batch.answers(batch.run()) == batch.expected()


def test_forward_is_causal_and_takes_images(shapes):
    case = cases_of("shapes")[0]
    batch = Batch("shapes", [case])
    out = shapes(**batch.inputs, labels=batch.input_ids)
    assert out.logits.shape == (1, len(case["input_ids"]), shapes.config.text_config.vocab_size)
    assert out.loss.isfinite()
    assert int(out.logits[0, -1].argmax()) == next(
        c["output_ids"][0] for c in cases_of("shapes") if c["case"] == 0 and c["generation_mode"] == "slow"
    )
    with torch.no_grad():
        changed = {**batch.inputs, "input_ids": batch.input_ids.clone()}
        changed["input_ids"][0, -1] = 5
        torch.testing.assert_close(shapes(**changed).logits[:, :-1], out.logits[:, :-1])
        kept = shapes(**batch.inputs, logits_to_keep=1)
        features = shapes.extract_feature(batch.inputs["pixel_values"], batch.inputs["image_grid_hws"])
        reused = shapes(input_ids=batch.input_ids, visual_features=features)
    torch.testing.assert_close(kept.logits, out.logits[:, -1:])
    torch.testing.assert_close(reused.logits, out.logits)
    assert isinstance(shapes(**batch.inputs, return_dict=False), tuple)


def copy_with_config(tmp_path, change) -> str:
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINTS["shapes"], folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_magi_means_the_default(tmp_path):
    def say_magi(config):
        config["_attn_implementation"] = "magi"

    folder = copy_with_config(tmp_path, say_magi)
    for kwargs in ({}, {"attn_implementation": "magi"}, {"attn_implementation": "sdpa"}):
        model = LocateAnythingBatchedForConditionalGeneration.from_pretrained(folder, **kwargs)
        implementations = {m.config._attn_implementation for m in (model, model.vision_model, model.language_model)}
        assert implementations == {"sdpa"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["text_config"].update(model_type="qwen3"), "'qwen3'"),
        (lambda c: c["text_config"].pop("null_token_id"), "'null': None"),
        (lambda c: c["text_config"].update(block_size=4), "block_size is 4"),
        (lambda c: c.update(box_start_token_id=151668), "vocabulary of 1440: .'box_start': 151668"),
        (lambda c: c.update(box_end_token_id=c["box_start_token_id"]), "share an id"),
        (lambda c: c.update(coord_end_token_id=1431), "span the coordinates"),
        (lambda c: c["text_config"].update(use_sliding_window=True), "use_sliding_window"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_name(tmp_path, change, message):
    folder = copy_with_config(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        LocateAnythingBatchedForConditionalGeneration.from_pretrained(folder)


def test_another_tower_is_refused_by_the_model_too():
    from transformers import Qwen3Config

    config = LocateAnythingConfig.from_pretrained(CHECKPOINTS["shapes"])
    towers = {name: getattr(config, name) for name in ("vision_config", "text_config")}  # as they are, or as dicts
    assert LocateAnythingConfig(**{**config.to_dict(), **towers}).text_config is config.text_config
    config.text_config = Qwen3Config(num_hidden_layers=1, vocab_size=1440, hidden_size=16)
    with pytest.raises(ValueError, match="'qwen3'"):
        LocateAnythingForConditionalGeneration(config)


def test_adapters_are_seen(shapes):
    """generate calls the very modules that adapters wrap, in the tower, the projector and the decoder."""
    called = set()
    names = {"language_model.model.layers.0.self_attn.q_proj", "language_model.model.layers.3.mlp.down_proj"}
    names |= {"vision_model.encoder.blocks.0.wqkv", "mlp1.1", "language_model.lm_head"}
    names |= {"language_model.model.embed_tokens", "language_model.model.layers.1", "vision_model.encoder.blocks.1"}
    hooks = [
        shapes.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in names
    ]
    batch = Batch("shapes", cases_of("shapes")[:1])
    batch.run()
    for hook in hooks:
        hook.remove()
    assert called == names


def test_forward_takes_embeddings_and_asks_for_something():
    model = LocateAnythingForConditionalGeneration.from_pretrained(CHECKPOINTS["shapes"]).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        torch.testing.assert_close(embedded, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    slot = model.config.image_token_index
    with pytest.raises(ValueError, match="1 image slots, but the images give 0 tokens"):
        model(input_ids=torch.tensor([[5, slot, 7]]))


def test_embeddings_and_decoder_can_be_put_in():
    model = LocateAnythingForConditionalGeneration.from_pretrained(CHECKPOINTS["shapes"]).eval()
    for get, put, owner, name in (
        (model.get_input_embeddings, model.set_input_embeddings, model.language_model.model, "embed_tokens"),
        (model.get_output_embeddings, model.set_output_embeddings, model.language_model, "lm_head"),
        (model.get_decoder, model.set_decoder, model.language_model, "model"),
    ):
        other = copy.deepcopy(get())
        put(other)
        assert get() is other is getattr(owner, name)
