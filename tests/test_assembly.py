"""upload_to_hub.py: the folder it builds, and what it refuses."""

import ast
import json
import os
from pathlib import Path

import pytest

import hub.assembly
from hub.assembly import assemble, fetch_base, readable_size, remote_code_files, switch_auto_map
from hub.errors import AssemblyError
from upload_to_hub import main

PROJECT = Path(__file__).resolve().parent.parent
MODEL = "modeling_locateanything_batched.LocateAnythingBatchedForConditionalGeneration"
# As the published config is laid out: keys before and after, a foreign auto_map inside, numbers that must stay
CONFIG = {
    "_attn_implementation": "magi",
    "architectures": ["LocateAnythingForConditionalGeneration"],
    "auto_map": {
        "AutoConfig": "configuration_locateanything.LocateAnythingConfig",
        "AutoModel": "modeling_locateanything.LocateAnythingForConditionalGeneration",
    },
    "model_type": "locateanything",
    "text_config": {"architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-06, "rope_theta": 1000000.0},
    "torch_dtype": "bfloat16",
    "vision_config": {
        "auto_map": {"AutoModel": "other/repository--modeling_moonvit.MoonVitPretrainedModel"},
        "model_type": "moonvit",
    },
}
PROCESSOR = {
    "auto_map": {
        "AutoImageProcessor": "image_processing_locateanything.LocateAnythingImageProcessor",
        "AutoProcessor": "processing_locateanything.LocateAnythingProcessor",
    },
    "in_token_limit": 25600,
}
TOKENIZER = {
    "auto_map": {"AutoProcessor": "processing_locateanything.LocateAnythingProcessor"},
    "chat_template": "naïve {{ x }}",
    "model_max_length": 16384,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def dump(data):
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


@pytest.fixture
def base(tmp_path):
    """A folder laid out like the official repository, with two shards of a few bytes."""
    folder = tmp_path / "base"
    files = {
        "config.json": dump(CONFIG),
        "preprocessor_config.json": dump(PROCESSOR),
        "processor_config.json": dump(PROCESSOR).rstrip("\n"),
        "tokenizer_config.json": dump(TOKENIZER),
        "vocab.json": "{}",
        "merges.txt": "#version: 0.2",
        "generation_config.json": '{"eos_token_id":   151645}',
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}),
        SHARDS[0]: "first shard",
        SHARDS[1]: "second shard",
        "README.md": "the base's card",
        "LICENSE": "the weights' licence",
        "assets/figure.png": "a picture",
        "modeling_locateanything.py": "raise SystemExit('the official code')",
        "configuration_locateanything.py": "",
        ".git/config": "",
        ".cache/huggingface/x.metadata": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "built"


def listing(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_remote_code_is_what_the_entry_files_import():
    names = {path.name for path in remote_code_files()}
    assert {"configuration.py", "modeling_locateanything_batched.py", "processing.py"} <= names
    for path in remote_code_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in names
    assert not names & {"locate.py", "upload_to_hub.py"}


def test_a_module_that_is_missing_is_named(tmp_path, monkeypatch):
    for path in remote_code_files():
        (tmp_path / path.name).write_text("from .absent import x", encoding="utf-8")
    monkeypatch.setattr(hub.assembly, "PROJECT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.py"):
        remote_code_files()


def test_folder_holds_the_base_and_our_code(base, target):
    before = {name: (base / name).read_bytes() for name in listing(base)}
    assert assemble(base, target) == target
    code = {path.name for path in remote_code_files()}
    kept = {name for name in before if not name.endswith(".py") and not name.startswith((".git/", ".cache/"))}
    assert listing(target) == kept | code | {"LICENSE-CODE"}
    for name in kept - {"config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"}:
        assert (target / name).read_bytes() == before[name]
    for name in code:
        assert (target / name).read_bytes() == (PROJECT / name).read_bytes()
    assert (target / "LICENSE-CODE").read_bytes() == (PROJECT / "LICENSE").read_bytes()
    # The base stays as it was, and no scratch folder is left
    assert {name: (base / name).read_bytes() for name in listing(base)} == before
    assert os.listdir(target.parent) == ["built"]


def test_only_the_code_keys_of_the_json_files_change(base, target):
    assemble(base, target)
    expected = json.loads(dump(CONFIG))
    expected["architectures"] = ["LocateAnythingBatchedForConditionalGeneration"]
    expected["auto_map"] = {
        "AutoConfig": "configuration.LocateAnythingConfig",
        "AutoModel": MODEL,
        "AutoModelForCausalLM": MODEL,
        "AutoModelForImageTextToText": MODEL,
    }
    del expected["vision_config"]["auto_map"]
    # As text, so that order and spelling count too
    assert (target / "config.json").read_text(encoding="utf-8") == dump(expected)
    processor = {
        **PROCESSOR,
        "auto_map": {
            "AutoImageProcessor": "processing.LocateAnythingImageProcessor",
            "AutoProcessor": "processing.LocateAnythingProcessor",
        },
    }
    assert (target / "preprocessor_config.json").read_text(encoding="utf-8") == dump(processor)
    assert (target / "processor_config.json").read_text(encoding="utf-8") == dump(processor).rstrip("\n")
    tokenizer = {**TOKENIZER, "auto_map": {"AutoProcessor": "processing.LocateAnythingProcessor"}}
    assert (target / "tokenizer_config.json").read_text(encoding="utf-8") == dump(tokenizer)


@pytest.mark.parametrize(
    "text", ['{"a" : 1.50,"auto_map":{ },\r\n "b":{"auto_map": {"x": "y"}} }', "{ }", '{"b":[1e-06]}']
)
def test_switching_leaves_every_other_byte(text):
    switched = switch_auto_map("config.json", text, "me/code", only_auto_map=True)
    data = json.loads(switched)
    assert data.pop("auto_map")["AutoModel"] == f"me/code--{MODEL}"
    assert data == {key: value for key, value in json.loads(text).items() if key != "auto_map"}
    for kept in ('{"a" : 1.50,', ',\r\n "b":{"auto_map": {"x": "y"}} }', '"b":[1e-06]}'):
        assert (kept in switched) == (kept in text)


def test_tokenizer_config_without_code_is_kept_byte_for_byte(base, target):
    (base / "tokenizer_config.json").write_text('{"a":1.50,\n   "b": "\\u00e9"}', encoding="utf-8")
    assemble(base, target)
    assert (target / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize("named", ["null", "[]"])
def test_tokenizer_config_that_names_nothing(base, target, named):
    (base / "tokenizer_config.json").write_text(f'{{"auto_map": {named}}}', encoding="utf-8")
    assemble(base, target)
    assert not read(target / "tokenizer_config.json")["auto_map"]


def test_line_ends_stay(base, target):
    for name in ("config.json", "tokenizer_config.json"):
        (base / name).write_bytes((base / name).read_bytes().replace(b"\n", b"\r\n"))
    (base / "processor_config.json").write_bytes(b'{\r\n  "a": 1\r\n}\r\n')
    assemble(base, target)
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        data = (target / name).read_bytes()
        assert data.count(b"\n") == data.count(b"\r\n") > 3


def test_hidden_files_and_leftovers_of_a_training_stay_behind(base, target):
    left = [".env", ".DS_Store", ".huggingface/token", "assets/.hidden", "checkpoint-500/model.safetensors", "runs/x"]
    left += ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json"]
    left += ["custom_generate/generate.py"]
    (base / ".git" / "config").unlink()
    (base / ".git").rmdir()
    for name in [*left, ".gitattributes", ".git"]:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("gitdir: x", encoding="utf-8")
    assemble(base, target)
    assert not listing(target) & {*left, ".git"} and ".gitattributes" in listing(target)


def test_every_class_that_auto_map_names_exists(base, target):
    assemble(base, target)
    for file in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        for reference in read(target / file)["auto_map"].values():
            module, name = reference.split(".")
            tree = ast.parse((target / f"{module}.py").read_text(encoding="utf-8"))
            defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
            imported = {
                alias.name
                for node in tree.body
                if isinstance(node, ast.ImportFrom) and node.level
                for alias in node.names
            }
            assert name in defined | imported


def test_weights_are_linked_or_copied(base, target, tmp_path):
    assemble(base, target)
    assert (target / SHARDS[0]).is_symlink()
    assert (target / SHARDS[0]).resolve() == base / SHARDS[0]
    assert not (target / "README.md").is_symlink()
    copied = assemble(base, tmp_path / "copied", weights="copy")
    assert not any((copied / name).is_symlink() for name in listing(copied))
    with pytest.raises(AssemblyError, match=r"'move'.*'link' or 'copy'"):
        assemble(base, tmp_path / "x", weights="move")


def test_links_fall_back_to_copies(base, target, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assemble(base, target)
    assert not (target / SHARDS[0]).is_symlink()
    assert (target / SHARDS[0]).read_text() == "first shard"


def test_our_own_folder_is_a_base_too(base, target, tmp_path):
    assemble(base, target)
    again = assemble(target, tmp_path / "again")
    assert listing(again) == listing(target)
    assert all((again / name).read_bytes() == (target / name).read_bytes() for name in listing(again))


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        (["config.json"], "config.json"),
        (["preprocessor_config.json"], "preprocessor_config.json"),
        (["tokenizer_config.json"], "tokenizer_config.json"),
        (["merges.txt"], r"merges\.txt \(or tokenizer\.json\)"),
        ([SHARDS[1]], SHARDS[1]),
        ([*SHARDS, "model.safetensors.index.json"], "model.safetensors"),
    ],
)
def test_missing_file_is_named_and_nothing_is_written(base, target, removed, named, capsys):
    for name in removed:
        (base / name).unlink()
    with pytest.raises(AssemblyError, match=named):
        assemble(base, target)
    assert not target.parent.exists()
    assert main(["--base", str(base), "--local-dir", str(target)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", '{"model_type": "qwen2"}', "model_type 'qwen2', expected 'locateanything'"),
        ("config.json", "{", r"config\.json is not JSON"),
        ("processor_config.json", "[]", r"processor_config\.json holds a JSON list"),
        ("model.safetensors.index.json", '{"weight_map": []}', "has no weight_map of tensors to files"),
        # json.loads takes the last of two, the switching the first
        ("config.json", '{"model_type": "locateanything", "auto_map": {}, "auto_map": {}}', "'auto_map' twice"),
        ("processor_config.json", '{"a": {"b": 1, "b": 1}}', r"processor_config\.json is not JSON \('b' twice"),
        ("tokenizer_config.json", '{"auto_map": 5}', r"tokenizer_config\.json has the auto_map 5"),
        ("config.json", '{"a":' * 99999, r"config\.json is not JSON"),
        ("LICENSE-CODE/a", "", "has a folder LICENSE-CODE, where this project's file goes"),
        (SHARDS[0], "", "is empty"),
        (SHARDS[0], "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_unusable_base_is_refused(base, target, file, text, message):
    (base / file).parent.mkdir(exist_ok=True)
    (base / file).write_text(text, encoding="utf-8")
    with pytest.raises(AssemblyError, match=message):
        assemble(base, target)
    assert not target.parent.exists()


def test_base_that_is_not_there(tmp_path, target, monkeypatch):
    with pytest.raises(AssemblyError, match="neither a folder nor a hub repository"):
        assemble(tmp_path / "absent", target)

    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr(hub.assembly, "snapshot_download", unreachable)
    with pytest.raises(
        AssemblyError, match=r"some/model is no folder, and the hub did not give it: no route to host$"
    ):
        assemble("some/model", target)


def test_hub_id_is_checked_before_its_weights_are_downloaded(base, target, monkeypatch):
    calls = []
    snapshot = base.rename(base.with_name("c0ffee"))

    def download(repo, revision=None, ignore_patterns=()):
        calls.append((repo, revision, "*.safetensors" in ignore_patterns))
        return str(snapshot)

    monkeypatch.setattr(hub.assembly, "snapshot_download", download)
    assemble("some/model", target, revision="main")
    # The weights are those of the commit that was checked
    assert calls == [("some/model", "main", True), ("some/model", "c0ffee", False)]
    assert (target / SHARDS[0]).resolve() == snapshot / SHARDS[0]
    (snapshot / "config.json").write_text("{}", encoding="utf-8")
    calls.clear()
    with pytest.raises(AssemblyError, match="model_type"):
        assemble("some/model", target.with_name("other"))
    assert calls == [("some/model", None, True)]


def test_revision_of_a_folder_is_refused(base, target):
    with pytest.raises(AssemblyError, match=r"revision.*'main'"):
        assemble(base, target, revision="main")


def test_overwrite_replaces_model_folders_only(base, target):
    target.mkdir(parents=True)
    assemble(base, target)
    (target / "stale.txt").write_text("old")
    with pytest.raises(AssemblyError, match="not empty"):
        assemble(base, target)
    assert (target / "stale.txt").exists()
    assemble(base, target, overwrite=True)
    assert not (target / "stale.txt").exists()
    assert (base / SHARDS[0]).read_text() == "first shard"
    assert os.listdir(target.parent) == ["built"]
    (target / "config.json").unlink()
    with pytest.raises(AssemblyError, match="no model folder"):
        assemble(base, target, overwrite=True)
    assert (target / SHARDS[0]).exists()


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_base_is_never_built_over(base, place):
    before = listing(base)
    with pytest.raises(AssemblyError, match="apart from the base"):
        assemble(base, base / place, overwrite=True)
    assert listing(base) == before


@pytest.mark.parametrize("text", ['{"auto_map": {}, "auto_map": {}}', "{", "[" * 99999])
def test_switching_refuses_what_it_cannot_read(text):
    with pytest.raises(AssemblyError, match=r"base: config\.json is not JSON"):
        switch_auto_map("config.json", text, only_auto_map=True)


@pytest.mark.parametrize("place", ["", "\0", "x" * 5000, "/dev/null/x", "~nobody-of-this-name/x"])
def test_places_that_are_none(base, place):
    with pytest.raises(AssemblyError, match="local_dir"):
        assemble(base, place)
    if place.startswith(("x", "~")):
        with pytest.raises(AssemblyError, match=r"base: .* is no path"):
            fetch_base(place)


def test_target_that_is_a_file_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AssemblyError, match="is a file"):
        assemble(base, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_build_leaves_what_was_there(base, target, monkeypatch, error):
    assemble(base, target)
    (target / "mark").write_text("the first build")
    execute = hub.assembly._execute

    def fail_late(step, folder):
        execute(step, folder)
        if step.name == "vocab.json":
            raise error

    monkeypatch.setattr(hub.assembly, "_execute", fail_late)
    with pytest.raises(type(error)):
        assemble(base, target, overwrite=True)
    assert (target / "mark").read_text() == "the first build"
    assert os.listdir(target.parent) == ["built"]


def test_a_build_that_cannot_take_its_place_leaves_what_was_there(base, target, monkeypatch):
    assemble(base, target)
    (target / "mark").write_text("the first build")
    rename = Path.rename

    def refuse(path, other):
        if path.name == "new":
            raise PermissionError("no")
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError):
        assemble(base, target, overwrite=True)
    assert (target / "mark").read_text() == "the first build"
    with pytest.raises(PermissionError):
        assemble(base, target.parent / "other")
    assert os.listdir(target.parent) == ["built"]


def test_sizes_are_said_in_their_unit():
    assert list(map(readable_size, (0, 999, 1500, 2_500_000, 7_660_000_000))) == [
        "0 B", "999 B", "1.5 kB", "2.5 MB", "7.66 GB",
    ]  # fmt: skip


def test_dry_run_prints_operations_and_writes_nothing(base, target, capsys):
    assert main(["--base", str(base), "--local-dir", str(target), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    actions = {line.split()[3]: line.split()[0] for line in lines[:-1]}
    assert actions[SHARDS[0]] == "link"
    assert actions["config.json"] == "edit"
    assert actions["vocab.json"] == "copy"
    assert actions["processing.py"] == "code"
    assert lines[-1].endswith("Nothing was written.")
    assert not target.parent.exists()


def test_command_line_builds_and_says_how_to_load(base, target, capsys):
    assert main(["--base", str(base), "--local-dir", str(target), "--weights", "copy"]) == 0
    assert f'from_pretrained("{target}", trust_remote_code=True)' in capsys.readouterr().out
    assert not (target / SHARDS[0]).is_symlink()
    assert main(["--base", str(base), "--local-dir", str(target)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["--base", str(base), "--local-dir", str(target), "--overwrite"]) == 0
