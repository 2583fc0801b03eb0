"""hub/loading.py: what the scanner, the server and the training load a model with."""

from pathlib import Path

import pytest
import torch

import hub.loading
from hub.loading import ModelError, load, loadable
from tests.conftest import CHECKPOINTS
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
