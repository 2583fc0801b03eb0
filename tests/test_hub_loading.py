"""hub/loading.py: what the scanner, the server and the training load a model with."""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from PIL import Image

import hub.loading
from hub.loading import ModelError, load, loadable
from tests.conftest import CHECKPOINTS, GOLDENS
from tests.test_docs import blocks_of
from upload_to_hub import assemble

DEMO = CHECKPOINTS["shapes"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Assembled folders go here and not to the user's cache."""
    monkeypatch.setattr(hub.loading, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_model_and_processor():
    model, processor = load(str(DEMO), device="cpu", dtype="bfloat16", attn_implementation="eager")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.config.text_config._attn_implementation == "eager"
    assert processor.image_processor.patch_size == 14


@pytest.mark.parametrize("free", [10**12, 0])
def test_float32_where_it_is_faster_and_memory_holds_it(monkeypatch, capsys, tmp_path, free):
    base = tmp_path / "base"
    shutil.copytree(DEMO, base)
    config = json.loads((base / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
        part["torch_dtype"] = "bfloat16"  # as in the official checkpoint
    (base / "config.json").write_text(json.dumps(config))
    told, _ = load(str(base), device="cpu", dtype="float32")
    assert load(str(base), device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16
    monkeypatch.setattr(hub.loading, "_float32_is_faster", lambda dtype: True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    capsys.readouterr()
    chosen, _ = load(str(base), device="cpu")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "dtype:" in line]
    assert chosen.dtype == (torch.float32 if free else torch.bfloat16)
    assert f"dtype: {str(chosen.dtype).removeprefix('torch.')}" in line
    expected = {**dict(told.named_parameters()), **dict(told.named_buffers())}
    for name, tensor in [*chosen.named_parameters(), *chosen.named_buffers()]:
        # the demo's weights are float32: they lost what bfloat16 lacks when they were loaded in it
        same = torch.equal if "rotary" in name else lambda a, b: torch.equal(a.bfloat16(), b.bfloat16())
        assert same(tensor, expected[name]), name
    monkeypatch.setattr(hub.loading, "_float32_is_faster", lambda dtype: False)
    assert load(str(base), device="cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_which_dtype_is_faster_is_measured(monkeypatch, slow):
    def linear(tokens, weight):
        time.sleep(0.05 if tokens.dtype == slow else 0.01)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    assert hub.loading._float32_is_faster(torch.bfloat16) == (slow == torch.bfloat16)


@pytest.mark.parametrize(("quantize", "device"), [("int4", "cpu"), ("int8", "cuda")])
def test_what_is_not_quantised(quantize, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match=f"quantize: .*'{quantize}'"):
        load(str(DEMO), device=device, quantize=quantize)


@pytest.mark.slow
def test_int8_rows_are_their_own_in_any_batch():
    """Each token is scaled by itself, so that a row's answer is bit for bit the one it gets alone."""
    model, processor = load(str(DEMO), dtype="float32", quantize="int8")
    kinds = Counter(type(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert torch.nn.Parameter not in kinds
    pictures = [Image.open(path) for path in sorted((GOLDENS / "shapes" / "images").glob("*.png"))[:6]]
    rows = [processor.questions(picture, ["red circle", "blue triangle"]) for picture in pictures]

    def answers(conversations):
        inputs = processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, padding=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=64)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])

    together = answers([row for pair in rows for row in pair])
    alone = [answer for pair in rows for row in pair for answer in answers([row])]
    end = processor.tokenizer.eos_token
    assert [text.split(end)[0] for text in together] == [text.split(end)[0] for text in alone]
    assert sum("<box>" in text for text in alone) > 6
    # and so in Python, as the docs have it
    (code,) = [code for _, code in blocks_of("docs/api.md", "py") if "torchao" in code]
    scope = {"folder": loadable(str(DEMO))}
    exec(code, scope)
    model = scope["model"]
    assert answers([row for pair in rows for row in pair]) == together


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=f"device: got '{device}'"):
        load(str(DEMO), device=device)


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json", "config.json", "preprocessor_config.json"])
def test_a_folder_with_a_broken_file(tmp_path, broken):
    base = tmp_path / "base"
    base.mkdir()
    for path in DEMO.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / broken).write_bytes(b"{")
    with pytest.raises(ModelError):
        load(str(base), device="cpu")


def test_foreign_code_is_assembled_once_and_ours_is_loaded_as_it_is(tmp_path, cache):
    first = loadable(str(DEMO))
    assert Path(first).is_relative_to(cache)
    assert loadable(str(DEMO)) == first
    built = assemble(DEMO, tmp_path / "built")
    assert loadable(str(built)) == str(built)


def test_changed_base_is_assembled_anew(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in DEMO.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    first = loadable(str(base))
    config = (base / "config.json").read_text(encoding="utf-8")
    (base / "config.json").write_text(config.replace('"magi"', '"eager"'), encoding="utf-8")
    second = loadable(str(base))
    assert second != first
    assert '"eager"' in (Path(second) / "config.json").read_text(encoding="utf-8")
