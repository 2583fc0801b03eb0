"""Damaged, foreign and dangerous checkpoints are refused before a weight is read; the code that loads is inert."""

from __future__ import annotations

import ast
import copy
import json
import math
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from locateanything.configuration import LocateAnythingConfig
from locateanything.loading import CheckedLoading, check_tokenizer, read_header
from locateanything.modeling_locateanything_batched import LocateAnythingBatchedForConditionalGeneration
from tests.conftest import CHECKPOINTS, GOLDENS
from upload_to_hub import assemble, remote_code_files

OFFICIAL = CHECKPOINTS["shapes"]
CONFIG = json.loads((OFFICIAL / "config.json").read_text())
WEIGHTS = (OFFICIAL / "model.safetensors").read_bytes()
HEADER = int.from_bytes(WEIGHTS[:8], "little")


if issubclass(LocateAnythingBatchedForConditionalGeneration, CheckedLoading):
    Model = LocateAnythingBatchedForConditionalGeneration
else:

    class Model(CheckedLoading, LocateAnythingBatchedForConditionalGeneration):
        """As the model itself once it takes the mixin."""


@pytest.fixture
def folder(tmp_path):
    """The small checkpoint without its weights."""
    shutil.copytree(OFFICIAL, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "checkpoint"


@pytest.fixture
def unread(monkeypatch):
    """No weight may be read: transformers' loading is out of reach."""

    def fail(*args, **kwargs):
        raise AssertionError("transformers was asked to load")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", fail)


def test_a_whole_checkpoint_is_loaded(folder):
    model = Model.from_pretrained(OFFICIAL)
    state = load_file(OFFICIAL / "model.safetensors")
    assert read_header(OFFICIAL) == {name: ("F32", list(tensor.shape)) for name, tensor in state.items()}
    model.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    again = Model.from_pretrained(str(folder), dtype=torch.float32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in state.items())
    assert Model.from_pretrained(None, config=model.config, state_dict=state).config is not None


# ---------------------------------------------------------------------------------------------- weights


def header_of(**changes) -> bytes:
    header = json.loads(WEIGHTS[8 : 8 + HEADER])
    for name, change in changes.items():
        header["mlp1.0.bias"][name] = change
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + WEIGHTS[8 + HEADER :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file, or cut off: 0 bytes"),
        (WEIGHTS[:7], "7 bytes"),
        (WEIGHTS[: 8 + HEADER - 1], "cut off"),
        (WEIGHTS[: 8 + HEADER], "its header tells of"),
        (WEIGHTS[:-1], f"has {len(WEIGHTS) - 1} bytes; its header tells of {len(WEIGHTS)}"),
        (WEIGHTS + b"\0", "its header tells of"),
        ((2**63).to_bytes(8, "little") + WEIGHTS[8:], "is no safetensors file"),
        (WEIGHTS[:8] + b"\xff" * HEADER + WEIGHTS[8 + HEADER :], "damaged header"),
        (WEIGHTS[:8] + b"[" * HEADER + WEIGHTS[8 + HEADER :], "damaged header"),
        (WEIGHTS[:8] + b"[]".ljust(HEADER) + WEIGHTS[8 + HEADER :], "damaged header"),
        (header_of(dtype="F33"), "damaged header.*F33"),
        (header_of(shape=[1]), "damaged header.*mlp1.0.bias"),
        (header_of(shape=[-1, -256]), "damaged header.*mlp1.0.bias"),
        (header_of(data_offsets=[0, 1024]), "damaged header"),
        (header_of(data_offsets=["a", "b"]), "damaged header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (pickle.dumps({"a": 1}) * 9, "is no safetensors file"),
    ],
)
def test_damaged_weights_are_refused_unread(folder, unread, content, message):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        Model.from_pretrained(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_header_is_refused_or_the_same(data, tmp_path_factory):
    """Bytes of the header are changed: an error, or every tensor's bytes are still a tensor's."""
    path = tmp_path_factory.getbasetemp() / "fuzzed" / "model.safetensors"
    path.parent.mkdir(exist_ok=True)
    content = bytearray(WEIGHTS)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 8 + HEADER - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        tensors = read_header(path.parent)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert sum(math.prod(shape) for _, shape in tensors.values()) * 4 == len(WEIGHTS) - 8 - HEADER


def test_weights_that_are_not_this_models_are_refused_unread(folder, unread):
    state = load_file(OFFICIAL / "model.safetensors")
    bias = state.pop("mlp1.1.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"its weights lack mlp1\.1\.bias; transformers would fill"):
        Model.from_pretrained(folder)
    save_file({**state, "mlp1.1.bias": bias[:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"mlp1\.1\.bias is \[127\], but the config makes it \[128\]"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index, folder: (folder / "b.safetensors").unlink(), r"b\.safetensors: is missing"),
        (lambda index, folder: index.update(weight_map=[]), "has no weight_map"),
        (lambda index, folder: index["weight_map"].update(x="b.safetensors"), r"b\.safetensors: lacks x"),
        (lambda index, folder: index["weight_map"].update(x="../b.safetensors"), r"names '\.\./b\.safetensors'"),
        (lambda index, folder: index["weight_map"].update(x="b.bin"), r"names 'b\.bin'"),
        (lambda index, folder: index.pop("metadata"), r"index\.json: has no metadata"),
        (lambda index, folder: index.update(metadata=[]), r"index\.json: has no metadata"),
        (lambda index, folder: index["weight_map"].pop("mlp1.0.bias"), r"b\.safetensors: holds mlp1\.0\.bias, which"),
        (lambda index, folder: shutil.copy(OFFICIAL / "model.safetensors", folder / "a.safetensors"), "a.*: holds"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_unread(folder, unread, change, message):
    names = sorted(read_header(OFFICIAL))
    state = load_file(OFFICIAL / "model.safetensors")
    save_file({name: state[name] for name in names[:9]}, folder / "a.safetensors")
    save_file({name: state[name] for name in names[9:]}, folder / "b.safetensors")
    index = {
        "metadata": {},
        "weight_map": {name: "a.safetensors" if name in names[:9] else "b.safetensors" for name in names},
    }
    change(index, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index)[:-1])
    with pytest.raises(ValueError, match=r"index\.json: is no JSON file"):
        Model.from_pretrained(folder)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter.pth"])
def test_pickle_is_never_loaded(folder, name):
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    for kwargs in ({}, {"use_safetensors": None}, {"use_safetensors": True}, {"weights_only": False}):
        with pytest.raises(ValueError, match=rf"holds neither model\.safetensors.*{name} may be pickle"):
            Model.from_pretrained(folder, **kwargs)
    with pytest.raises(ValueError, match="use_safetensors=False: pickle"):
        Model.from_pretrained(folder, use_safetensors=False)
    shutil.copy(OFFICIAL / "model.safetensors", folder)  # beside safetensors it is left alone
    assert Model.from_pretrained(folder).config.image_token_index == 420


# ---------------------------------------------------------------------------------------------- tokenizer


def test_another_tokenizer_is_refused_unread(folder, unread):
    shutil.copy(OFFICIAL / "model.safetensors", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {entry["content"]: int(index) for index, entry in settings["added_tokens_decoder"].items()}
    for token, index in (("<box>", 424), ("<1000>", None), ("<IMG_CONTEXT>", 5)):
        wrong = {**added, token: index}
        message = rf"{token} has the id {index}, but the config's \w+ is \d+; the tokenizer is another"
        (folder / "added_tokens.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=rf"added_tokens\.json: {message}"):
            Model.from_pretrained(folder)
        (folder / "added_tokens.json").unlink()
        (folder / "tokenizer_config.json").write_text("{}")
        entries = [{"id": own, "content": content} for content, own in wrong.items()]
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": entries}))
        with pytest.raises(ValueError, match=rf"tokenizer\.json: {message}"):
            Model.from_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: is no JSON"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_every_file_of_a_tokenizer_is_examined(folder, unread, name):
    """With the other files as they are: which one counts depends on the release of transformers."""
    shutil.copy(OFFICIAL / "model.safetensors", folder)
    text = (folder / name).read_text()
    content = json.loads(text)
    if name == "added_tokens.json":
        content["<box>"], content["<ref>"] = content["<ref>"], content["<box>"]
    elif name == "tokenizer_config.json":
        decoder = content["added_tokens_decoder"]
        box, ref = (
            next(i for i, entry in decoder.items() if entry["content"] == token) for token in ("<box>", "<ref>")
        )
        decoder[box], decoder[ref] = decoder[ref], decoder[box]
    else:
        for entry in content["added_tokens"]:
            entry["content"] = {"<box>": "<ref>", "<ref>": "<box>"}.get(entry["content"], entry["content"])
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: <box> has the id \d+, but the config's box_start is"):
        Model.from_pretrained(folder)
    (folder / name).write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: is no JSON"):
        Model.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        {"added_tokens_decoder": {"420": "x"}}, {"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"a": {}}},
        {"added_tokens": ["x"]}, {"added_tokens": [{"content": [1]}]}, {"added_tokens": 3},
    ],
)  # fmt: skip
def test_damaged_tokens_are_refused_unread(folder, unread, content):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json: has damaged tokens"):
        Model.from_pretrained(folder)


def test_a_tokenizer_in_any_of_its_files_is_read(folder, unread):
    """Without added_tokens.json, as transformers 5 writes it; a file that names no tokens tells nothing."""
    (folder / "added_tokens.json").unlink(missing_ok=True)
    config = LocateAnythingConfig.from_pretrained(folder)
    check_tokenizer(folder, config)
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text("{}")
    entries = [{"id": int(index), "content": entry["content"]} for index, entry in decoder.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": entries}))
    check_tokenizer(folder, config)
    (folder / "tokenizer.json").write_text("{}")
    check_tokenizer(folder, config)  # by now nothing tells of tokens
    (folder / "added_tokens.json").write_text("[]")
    with pytest.raises(ValueError, match=r"added_tokens\.json: holds a list; expected a JSON object"):
        check_tokenizer(folder, config)


def test_weights_under_other_names_are_not_compared(folder):
    state = load_file(OFFICIAL / "model.safetensors")
    save_file({f"old.{name}": value for name, value in state.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="its weights lack"):
        Model.from_pretrained(folder)
    model = Model.from_pretrained(folder, key_mapping={r"^old\.": ""})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_tied_embeddings_need_no_head(folder):
    """And with a head of their own, as the official checkpoint has it, the head is needed."""
    state = load_file(OFFICIAL / "model.safetensors")
    head = state.pop("language_model.lm_head.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for tied in (False, True):
        config = copy.deepcopy(CONFIG)
        for part in (config, config["text_config"]):
            part["tie_word_embeddings"] = tied
        (folder / "config.json").write_text(json.dumps(config))
        if tied:
            model = Model.from_pretrained(folder)
            assert torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
        else:
            with pytest.raises(ValueError, match=r"its weights lack language_model\.lm_head\.weight;"):
                Model.from_pretrained(folder)
    assert head.shape == model.get_output_embeddings().weight.shape


# ---------------------------------------------------------------------------------------------- configuration

OURS = [
    *((key,) for key in CONFIG if key.endswith(("_id", "_index", "_layers", "_config"))),
    *(("text_config", key) for key in CONFIG["text_config"] if key.endswith(("_id", "_size", "_heads", "_layers"))),
    *(("text_config", key) for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "model_type")),
    *(("vision_config", key) for key in CONFIG["vision_config"] if key not in ("model_type", "torch_dtype")),
]
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 1445), st.integers(), st.floats(), st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=3), st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OURS), st.one_of(st.just("missing"), JUNK)), min_size=1, max_size=3))
def test_a_damaged_config_is_refused_or_makes_sense(changes):
    config = copy.deepcopy(CONFIG)
    for path, value in changes:
        part = config
        for key in path[:-1]:
            part = part.get(key)
        if not isinstance(part, dict):
            continue
        if value == "missing":
            part.pop(path[-1], None)
        else:
            part[path[-1]] = value
    try:
        read = LocateAnythingConfig.from_dict(config)
    except ValueError as error:
        assert len(str(error)) > 20
        return
    roles = vars(read.token_roles)
    assert len(set(roles.values())) == len(roles)
    assert all(0 <= index < read.text_config.vocab_size for index in (*roles.values(), read.pad_token_id))
    text, vision = read.text_config, read.vision_config
    assert text.hidden_size % text.num_attention_heads == text.num_attention_heads % text.num_key_value_heads == 0
    assert vision.hidden_size % vision.num_attention_heads == 0 and len(vision.merge_kernel_size) == 2


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (None, {"none_token_id": 500}, r"among the coordinates 432 … 1432: \{'none': 500\}"),
        (None, {"pad_token_id": 420}, "pad_token_id=420 .*is a token role too"),
        (None, {"pad_token_id": 1440}, "outside the vocabulary of 1440: {'pad': 1440}"),
        (None, {"box_start_token_id": True}, "outside the vocabulary"),
        (None, {"mlp_connector_layers": 3}, "mlp_connector_layers=3: the projector of this model has 2 layers"),
        (None, {"text_config": [1]}, "text_config is a list"),
        (None, {"vision_config": "x"}, "vision_config is a str"),
        ("text_config", {"num_hidden_layers": 10**9}, "text_config.num_hidden_layers is 1000000000"),
        ("text_config", {"hidden_size": 0}, "text_config.hidden_size is 0; expected a whole number from 1"),
        ("text_config", {"hidden_size": 130}, "must give an even head size"),
        ("text_config", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
        ("text_config", {"rope_theta": None}, "text_config.rope_theta is None"),
        ("text_config", {"rms_norm_eps": -1.0}, "text_config.rms_norm_eps is -1.0"),
        (None, {"num_labels": "x"}, "config: .*str"),
        (None, {"dtype": "float99"}, "config: .*float99"),
        (
            None,
            {"quantization_config": {"quant_method": "x"}},
            "quantization_config is .*a method that transformers lacks",
        ),
        (None, {"quantization_config": "x"}, r"config\.json: has a value that nothing can be made of .*str"),
        ("text_config", {"hidden_act": "nope"}, "text_config.hidden_act is 'nope'"),
        ("text_config", {"head_dim": 0}, "text_config.head_dim is 0; expected an even number"),
        ("text_config", {"attention_dropout": 7.0}, "text_config.attention_dropout is 7.0"),
        ("text_config", {"pad_token_id": 10**6}, "text_config.pad_token_id is 1000000; expected one of 1440 ids"),
        ("text_config", {"tie_word_embeddings": "x"}, "tie_word_embeddings"),
        (
            "text_config",
            {"rope_scaling": {"rope_type": "linear", "factor": "x"}},
            "config.json: has a value that nothing",
        ),
        ("text_config", {"eos_token_id": []}, "outside the vocabulary.*'end': \\[\\]"),
        ("vision_config", {"patch_size": 0}, "vision_config.patch_size is 0"),
        ("vision_config", {"merge_kernel_size": [2, 0]}, "vision_config.merge_kernel_size is"),
        ("vision_config", {"num_attention_heads": 0}, "vision_config.num_attention_heads is 0"),
    ],
)
def test_what_is_wrong_in_a_config_is_named(folder, unread, part, change, message):
    shutil.copy(OFFICIAL / "model.safetensors", folder)
    config = copy.deepcopy(CONFIG)
    (config if part is None else config[part]).update(change)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(folder)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers", "rope_theta"])
def test_a_tower_is_not_filled_up_with_another_models_numbers(name):
    config = copy.deepcopy(CONFIG)
    del config["text_config"][name]
    with pytest.raises(ValueError, match=rf"text_config.*{name}"):
        LocateAnythingConfig.from_dict(config)


def test_rope_theta_is_read_as_either_transformers_writes_it():
    config = copy.deepcopy(CONFIG)
    del config["text_config"]["rope_theta"]
    config["text_config"]["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    text = LocateAnythingConfig.from_dict(config).text_config
    assert (getattr(text, "rope_parameters", None) or {}).get("rope_theta", getattr(text, "rope_theta", 0)) == 5e5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", json.dumps(CONFIG)[:-9], "is no JSON file"),
        ("config.json", "[]", "holds a list; expected a JSON object"),
        ("generation_config.json", '{"max_new', "is no JSON file"),
        ("generation_config.json", "5", "holds a int"),
        ("generation_config.json", '{"max_new_tokens": "x"}', "has a value that nothing can be made of"),
    ],
)
def test_a_damaged_config_file_is_refused_unread(folder, unread, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: {message}"):
        Model.from_pretrained(folder)
    if name == "config.json":
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            Model.from_pretrained(folder, config=str(folder / name))


@pytest.mark.parametrize("key", sorted(CONFIG["text_config"].keys() | {"head_dim", "rope_scaling", "layer_types"}))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=JUNK)
def test_whatever_the_text_config_says_is_loaded_or_refused(tmp_path_factory, key, value):
    """Every key with any value, as far as the weights: the model is built from it, or a ValueError says why not."""
    folder = tmp_path_factory.getbasetemp() / f"any-{key}"
    if not folder.exists():
        shutil.copytree(OFFICIAL, folder)
    config = copy.deepcopy(CONFIG)
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model = Model.from_pretrained(folder)
    except ValueError as error:
        assert len(str(error)) > 20
    else:
        assert next(model.parameters()).shape == next(Model(LocateAnythingConfig.from_dict(CONFIG)).parameters()).shape


def test_a_tower_that_was_changed_after_it_was_made_is_refused():
    """transformers 5 looks at what is assigned itself, but at nothing that comes another way."""
    text = LocateAnythingConfig.from_dict(CONFIG).text_config
    vars(text)["tie_word_embeddings"] = "x"
    with pytest.raises(ValueError, match=r"text_config\.tie_word_embeddings is 'x'; expected true or false"):
        LocateAnythingConfig(
            **{name: value for name, value in CONFIG.items() if "config" not in name}, text_config=text
        )


def test_a_config_that_is_not_there_is_not_found(folder, unread):
    with pytest.raises(OSError, match="absent"):
        Model.from_pretrained(folder, config=str(folder / "absent.json"))


def test_an_adapters_base_is_examined(folder, unread, tmp_path, monkeypatch):
    """Of an adapter's folder transformers loads the base that it names, where peft is installed."""
    monkeypatch.setattr("locateanything.loading.is_peft_available", lambda: True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for content, message in [
        ({}, r"adapter_config\.json: its base_model_name_or_path is None"),
        (
            {"base_model_name_or_path": str(folder)},
            r"adapter: holds no adapter_model\.safetensors; pickle is never loaded",
        ),
    ]:
        (adapter / "adapter_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            Model.from_pretrained(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint: holds neither model\.safetensors"):
        Model.from_pretrained(adapter)
    shutil.copy(OFFICIAL / "model.safetensors", folder)
    with pytest.raises(AssertionError, match="transformers was asked to load"):
        Model.from_pretrained(adapter)


def test_a_kernel_that_is_missing_is_no_fault_of_the_config():
    config = LocateAnythingConfig.from_pretrained(OFFICIAL, attn_implementation="flash_attention_2")
    with pytest.raises(ImportError, match=r"(?i)flash.?attention"):
        Model.from_pretrained(OFFICIAL, config=config)


def test_whole_numbers_are_no_weights_unless_the_config_says_so(folder, unread):
    state = load_file(OFFICIAL / "model.safetensors")
    save_file({name: value.to(torch.int8) for name, value in state.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"and \d+ more are I8; expected floating point"):
        Model.from_pretrained(folder)
    told = {**CONFIG, "quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(AssertionError, match="transformers was asked to load"):
        Model.from_pretrained(folder)


def test_the_words_of_a_tokenizer_are_examined(folder, unread):
    shutil.copy(OFFICIAL / "model.safetensors", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    places = sorted(words.values())
    backwards = {word: places[-1 - index] for word, index in words.items()}
    for wrong, message in [
        (
            backwards,
            rf"the id {CONFIG['none_token_id']}, the config's none_token_id, is of '.*'; expected the word none",
        ),
        (words | {"new": 7}, f"has {len(words) + 1} words for {len(words)} ids"),
        (words | {"new": "7"}, "has a damaged vocabulary"),
        ([1], "has a damaged vocabulary"),
    ]:
        for name in ("vocab.json", "tokenizer.json"):
            sound = (folder / name).read_text()
            content = wrong if name == "vocab.json" else {**tokenizer, "model": {**tokenizer["model"], "vocab": wrong}}
            (folder / name).write_text(json.dumps(content))
            with pytest.raises(ValueError, match=rf"{re.escape(name)}: ({message}|holds a list)"):
                Model.from_pretrained(folder)
            (folder / name).write_text(sound)


def test_another_token_in_a_tokens_place_is_refused(folder, unread):
    """<box> is gone from tokenizer.json only, and its id is another's."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    entry = next(entry for entry in tokenizer["added_tokens"] if entry["content"] == "<box>")
    entry["content"] = "<crate>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer\.json: <box> has the id None, but the config's box_start is"):
        Model.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------- what the code may do

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint", "globals"}
FORBIDDEN_MODULES = {
    *("subprocess", "importlib", "pickle", "marshal", "shelve", "ctypes", "socket", "shutil", "tempfile", "runpy"),
    *("multiprocessing", "pty", "code", "codeop", "builtins", "dill", "joblib", "requests", "huggingface_hub"),
}
FORBIDDEN_ATTRIBUTES = {
    *("system", "popen", "spawn", "fork", "execv", "execve", "remove", "unlink", "rename", "rmdir", "mkdir"),
    *("write_text", "write_bytes", "touch", "chmod", "environ", "getenv", "putenv", "load_library", "torch_load"),
}
ALLOWED_OPENS = {'path.open("rb")', "Image.open(file)"}


@pytest.mark.parametrize("path", sorted({*remote_code_files(), *[GOLDENS.parent.parent / "loading.py"]}), ids=str)
def test_remote_code_is_inert(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            wrong.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            wrong.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".open"):
            wrong += {ast.unparse(node).replace("'", '"')} - ALLOWED_OPENS
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.hub.load", "np.load"):
            wrong.append(ast.unparse(node))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            wrong += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
            if node not in tree.body:
                wrong.append(f"an import at call time: {ast.unparse(node)}")
    assert wrong == []


WATCHED = """
import os, sys
os.environ["HF_HOME"] = sys.argv[3]
import torch, transformers, PIL.Image, socket
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, Qwen2ForCausalLM
torch.set_num_threads(1)
seen = []
DOES = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect",
        "socket.getaddrinfo", "socket.sendto", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree"}
def watch(event, args):
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if not (event in DOES or writes):
        return
    place = os.fspath(args[0]) if args and isinstance(args[0], (str, os.PathLike)) else ""
    if event.startswith(("os.", "open", "shutil.")) and place.startswith((sys.argv[3], "/dev/null")):
        return
    seen.append((event, [str(arg)[:80] for arg in args]))
sys.addaudithook(watch)
def closed(*args, **kwargs):
    raise OSError("the network is closed")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = closed
folder, image = sys.argv[1:3]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Point to: x."}]}]
inputs = processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True)
output = model.generate(**inputs, max_new_tokens=8)
processor.post_process_grounding(output)
print("SEEN", seen)
"""


def test_loading_and_answering_touch_no_network_process_pickle_or_file(tmp_path):
    """A process that tells of every connection, process, unpickling, and write outside of the cache."""
    folder = assemble(OFFICIAL, tmp_path / "drop-in")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    run = subprocess.run(
        [sys.executable, "-B", "-c", WATCHED, folder, GOLDENS / "shapes" / "images" / "000.png", tmp_path / "cache"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.stdout.strip().endswith("SEEN []"), run.stdout + run.stderr
