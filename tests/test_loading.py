"""What would load wrong is refused; what loads in other ways goes on; the code that loads is inert."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from locateanything.configuration import LocateAnythingConfig
from locateanything.modeling_locateanything_batched import LocateAnythingBatchedForConditionalGeneration as Model
from tests.conftest import CHECKPOINTS, GOLDENS
from upload_to_hub import assemble, remote_code_files

OFFICIAL = CHECKPOINTS["shapes"]
CONFIG = json.loads((OFFICIAL / "config.json").read_text())
STATE = load_file(OFFICIAL / "model.safetensors")
HEAD = "language_model.lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    """The small checkpoint without its weights."""
    shutil.copytree(OFFICIAL, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "checkpoint"


def put(folder, state=STATE, config=CONFIG) -> None:
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def changed(**changes) -> dict:
    """The config with other values in its text tower."""
    return {**CONFIG, "text_config": {**CONFIG["text_config"], **changes}}


# ---- what loads, loads whole


def loads(folder, state=STATE, **kwargs) -> Model:
    model = Model.from_pretrained(folder, **kwargs)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    return model


def test_shards_other_names_and_a_state_in_hand(folder):
    model = loads(OFFICIAL)
    model.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    loads(folder)
    loads(str(folder.parent), subfolder=folder.name)
    loads(None, config=model.config, state_dict=STATE)
    _, info = Model.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_key_mapping_and_mismatched_sizes(folder):
    put(folder, {f"old.{name}": value for name, value in STATE.items()})
    loads(folder, key_mapping={r"^old\.": ""})
    with pytest.raises(ValueError, match=r"missing: .*unexpected: old\."):
        Model.from_pretrained(folder)
    put(folder, {**STATE, "mlp1.1.bias": STATE["mlp1.1.bias"][:-1].clone()})
    Model.from_pretrained(folder, ignore_mismatched_sizes=True)
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch|ignore_mismatched_sizes"):
        Model.from_pretrained(folder)


def test_a_tied_head_may_be_left_out(folder):
    put(folder, {name: value for name, value in STATE.items() if name != HEAD})
    model = Model.from_pretrained(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    untied = {**changed(tie_word_embeddings=False), "tie_word_embeddings": False}
    put(folder, {name: value for name, value in STATE.items() if name != HEAD}, untied)
    with pytest.raises(ValueError, match=rf"missing: {HEAD}"):
        Model.from_pretrained(folder)


# ---- what would load wrong without more than a warning


def test_a_tensor_that_is_missing_or_too_many(folder):
    put(folder, {name: value for name, value in STATE.items() if name != "mlp1.1.bias"})
    with pytest.raises(ValueError, match=r"missing: mlp1\.1\.bias"):
        Model.from_pretrained(folder)
    put(folder, {**STATE, "mlp1.5.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"unexpected: mlp1\.5\.bias"):
        Model.from_pretrained(folder)


def test_a_config_with_fewer_layers_than_the_checkpoint(folder):
    put(folder, STATE, changed(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"unexpected: language_model\.model\.layers\.3\."):
        Model.from_pretrained(folder)


def test_a_tensor_in_two_files(folder):
    """Which of them is read depends on the release of transformers."""
    names = sorted(STATE)
    save_file({name: STATE[name] for name in names[:9]}, folder / "a.safetensors", {"format": "pt"})
    held = {name: STATE[name] for name in names[8:]} | {names[8]: STATE[names[8]] + 1}
    save_file(held, folder / "b.safetensors", {"format": "pt"})
    weight_map = {name: "a.safetensors" if name in names[:9] else "b.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=rf"in two files: {names[8]}"):
        Model.from_pretrained(folder)


def test_an_unknown_quantisation_method(folder):
    put(folder, STATE, {**CONFIG, "quantization_config": {"quant_method": "x"}})
    with pytest.raises(ValueError, match=r"'x'.*, a method that transformers lacks"):
        Model.from_pretrained(folder)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickle_is_never_loaded(folder, name):
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    for kwargs in ({}, {"use_safetensors": None}, {"use_safetensors": True}, {"weights_only": False}):
        with pytest.raises(OSError, match=r"safetensors"):
            Model.from_pretrained(folder, **kwargs)
    with pytest.raises(ValueError, match="use_safetensors=False: pickle"):
        Model.from_pretrained(folder, use_safetensors=False)
    put(folder)  # beside safetensors it is left alone
    loads(folder)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers", "rope_theta"])
def test_a_tower_is_not_filled_up_with_another_models_numbers(name):
    config = copy.deepcopy(CONFIG)
    del config["text_config"][name]
    with pytest.raises(ValueError, match=rf"text_config lacks {name}"):
        LocateAnythingConfig.from_dict(config)


def test_rope_theta_is_read_as_either_transformers_writes_it():
    config = copy.deepcopy(CONFIG)
    del config["text_config"]["rope_theta"]
    config["text_config"]["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    text = LocateAnythingConfig.from_dict(config).text_config
    assert (getattr(text, "rope_parameters", None) or {}).get("rope_theta", getattr(text, "rope_theta", 0)) == 5e5


@pytest.mark.parametrize("implementation", ["flex_attention", "made_up"])
def test_an_attention_that_the_model_lacks_is_refused(implementation):
    with pytest.raises((ValueError, ImportError), match=implementation):
        Model.from_pretrained(OFFICIAL, attn_implementation=implementation)
    model = Model.from_pretrained(OFFICIAL)
    model.vision_model.config._attn_implementation = implementation  # as with a function registered for others
    with pytest.raises(ValueError, match=rf"attn_implementation='{implementation}'"):
        model.extract_feature(torch.zeros(4, 3, 14, 14), [[2, 2]])
    model.language_model.config._attn_implementation = implementation
    with pytest.raises(ValueError, match=rf"attn_implementation='{implementation}'"):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=1)


# ---- what the code may do

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "open", "input", "breakpoint", "globals"}
FORBIDDEN_MODULES = {
    *("subprocess", "importlib", "pickle", "marshal", "shelve", "ctypes", "socket", "shutil", "tempfile", "runpy"),
    *("multiprocessing", "pty", "code", "codeop", "builtins", "dill", "joblib", "requests", "huggingface_hub"),
}
FORBIDDEN_ATTRIBUTES = {
    *("system", "popen", "spawn", "fork", "execv", "execve", "remove", "unlink", "rename", "rmdir", "mkdir"),
    *("write_text", "write_bytes", "touch", "chmod", "environ", "getenv", "putenv", "load_library", "torch_load"),
}
ALLOWED_OPENS = ("Image.open(", 'path.open("rb")', '(folder / shard).open("rb")')
ALLOWED_AT_CALL_TIME = {
    "from peft import LoraConfig, get_peft_model",  # by the caller's own wish
    "from torch.nn.attention.varlen import varlen_attn",  # where torch has it
}
ALLOWED_ATTRIBUTES = {"self.waiting.remove"}  # of a deque


@pytest.mark.parametrize("path", sorted(remote_code_files()), ids=str)
def test_remote_code_is_inert(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            wrong.append(ast.unparse(node))
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_ATTRIBUTES:
            wrong += {ast.unparse(node)} - ALLOWED_ATTRIBUTES
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".open"):
            call = ast.unparse(node).replace("'", '"')
            wrong += [] if call.startswith(ALLOWED_OPENS) else [call]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.hub.load", "np.load"):
            wrong.append(ast.unparse(node))
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            wrong += [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
            typed = isinstance(node, ast.ImportFrom) and node.level  # under TYPE_CHECKING
            if node not in tree.body and not typed:
                wrong += {ast.unparse(node)} - ALLOWED_AT_CALL_TIME
    assert wrong == []


WATCHED = """
import os, sys
os.environ["HF_HOME"] = sys.argv[3]
for name in ("torchvision", "decord", "lmdb", "cv2", "peft", "flash_attn", "scipy"):
    sys.modules[name] = None  # none of them is needed
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


def test_loading_and_answering_say_nothing_and_touch_no_network_process_pickle_or_file(tmp_path):
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
    # transformers imports torchao where it is installed, which tells what it lacks
    let_be = ("Loading weights", "torchao", "warnings.warn", "_pytree.py")
    said = [line for line in run.stderr.splitlines() if line.strip() and not any(map(line.__contains__, let_be))]
    assert not said, "loading and answering print something"
