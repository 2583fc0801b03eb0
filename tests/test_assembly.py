"""upload_to_hub.py: the folder it builds, and what it refuses."""

import ast
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import hub.assembly
from hub.assembly import MODEL, MODEL_ENTRIES, assemble, edited, open_base, remote_code_files
from hub.errors import HubError
from tests.conftest import CHECKPOINTS, ROOT
from upload_to_hub import main

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
STOCK_PROCESSOR = "processing_locateanything.LocateAnythingProcessor"


@pytest.fixture
def base(tmp_path):
    """A folder laid out like the official repository, with two shards of a few bytes."""
    folder = tmp_path / "base"
    shutil.copytree(CHECKPOINTS["shapes"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    change(
        folder / "config.json", lambda data: data["vision_config"].update(auto_map={"AutoModel": "other/repo--m.M"})
    )
    change(folder / "tokenizer_config.json", lambda data: data.update(auto_map={"AutoProcessor": STOCK_PROCESSOR}))
    change(folder / "vocab.json", lambda data: data.update(model=1435, added_tokens_decoder=1436))  # words, as others
    files = {
        "generation_config.json": '{"eos_token_id":   151645}',
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}),
        "README.md": "the base's card",
        "LICENSE": "the weights' licence",
        "assets/figure.png": "a picture",
        ".gitattributes": "",
        "modeling_locateanything.py": "raise SystemExit('the official code')",
        "configuration_locateanything.py": "",
        # what stays behind: hidden files, and what a training left
        **dict.fromkeys((".git/config", ".env", ".cache/huggingface/x.metadata", "assets/.hidden"), ""),
        **dict.fromkeys(("checkpoint-500/model.safetensors", "runs/x", "optimizer.pt", "training_args.bin"), ""),
        "custom_generate/generate.py": "raise SystemExit",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for tensor, name in zip("ab", SHARDS, strict=True):
        save_file({tensor: np.ones(3, np.float32)}, folder / name)
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "built"


def change(path, how):
    path.write_bytes(edited(path, how))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_remote_code_is_what_the_entry_files_import():
    names = {path.name for path in remote_code_files()}
    assert {"configuration.py", "modeling_locateanything_batched.py", "processing.py", "vision.py"} <= names
    for path in remote_code_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in names
    model = {path.name for path in remote_code_files(MODEL_ENTRIES)}
    assert model < names and not model & {"processing.py", "image_processing.py"}
    assert not names & {"locate.py", "upload_to_hub.py"}


def test_folder_holds_the_base_and_our_code(base, target):
    before = contents(base)
    assert assemble(base, target) == target
    after = contents(target)
    code = {path.name: path.read_bytes() for path in remote_code_files()}
    code["LICENSE-CODE"] = (ROOT / "LICENSE").read_bytes()
    kept = {"README.md", "LICENSE", "assets/figure.png", ".gitattributes", *SHARDS, "generation_config.json"}
    kept |= {"model.safetensors.index.json", *(path.name for path in CHECKPOINTS["shapes"].iterdir())}
    kept -= {"model.safetensors"}
    switched = {"config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"}
    assert after.keys() == kept | code.keys()
    assert {name: after[name] for name in code} == code
    assert {name for name in kept if after[name] != before[name]} == switched
    # The base stays as it was, and no scratch folder is left
    assert contents(base) == before and os.listdir(target.parent) == ["built"]
    # Its own folder is a base too
    assert contents(assemble(target, target.with_name("again"))) == after


def test_only_the_code_keys_of_the_json_files_change(base, target):
    assemble(base, target)
    config = read(base / "config.json")
    config["architectures"] = [MODEL.split(".")[1]]
    ours = dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"), MODEL)
    config["auto_map"] = {"AutoConfig": "configuration.LocateAnythingConfig", **ours}
    config["vision_config"]["auto_map"] = {}  # it named code in a third repository
    tokenizer = read(base / "tokenizer_config.json")
    tokenizer["auto_map"] = {"AutoProcessor": "processing.LocateAnythingProcessor"}
    # As text, so that order and spelling count too
    for name, expected in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        text = (target / name).read_text(encoding="utf-8").rstrip("\n")
        assert text == json.dumps(expected, indent=2, ensure_ascii=text.isascii())
    lines = [(folder / "processor_config.json").read_text().splitlines() for folder in (base, target)]
    assert [line for line in lines[1] if line not in lines[0]] == [
        '    "AutoImageProcessor": "image_processing.LocateAnythingImageProcessor",',
        '    "AutoProcessor": "processing.LocateAnythingProcessor"',
    ]


def test_every_class_that_auto_map_names_exists(base, target):
    assemble(base, target)
    for file in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        for reference in read(target / file)["auto_map"].values():
            module, name = reference.split(".")
            tree = ast.parse((target / f"{module}.py").read_text(encoding="utf-8"))
            defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
            imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
            assert name in defined | {alias.name for node in imports for alias in node.names}


def test_a_processor_that_transformers_5_saved(base, target):
    """It has the image processor's settings, and with them the code that they name, in processor_config.json."""
    settings = read(base / "preprocessor_config.json")
    settings["auto_map"] = {
        "AutoImageProcessor": "image_processing_locateanything.X",
        "AutoProcessor": STOCK_PROCESSOR,
    }
    change(base / "processor_config.json", lambda data: data.update(image_processor=settings))
    for name in ("preprocessor_config.json", "vocab.json", "merges.txt", "added_tokens.json"):
        (base / name).unlink()
    assemble(base, target)
    assert "locateanything." not in json.dumps(read(target / "processor_config.json"))


@pytest.mark.parametrize("link", [True, False])
def test_weights_are_linked_or_copied(base, target, link, monkeypatch):
    if not link:  # where the file system has none
        monkeypatch.setattr(Path, "symlink_to", lambda *_: exec("raise OSError('no links here')"))
    assemble(base, target)
    assert (target / SHARDS[0]).is_symlink() == link and (target / SHARDS[0]).read_bytes()
    assert not (target / "README.md").is_symlink()
    copied = assemble(base, target.with_name("copied"), weights="copy")
    assert not any(path.is_symlink() for path in copied.iterdir())
    with pytest.raises(HubError, match=r"'move'.*'link' or 'copy'"):
        assemble(base, target.with_name("x"), weights="move")


def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def set_ids(name, **ids):
    return lambda folder: change(folder / name, lambda data: data.update(ids))


def set_none(folder):
    change(folder / "config.json", lambda data: data.update(none_token_id=1))


BROKEN = {
    "lacks config.json": remove("config.json"),
    "lacks preprocessor_config.json or": remove("preprocessor_config.json", "processor_config.json"),
    "lacks tokenizer_config.json": remove("tokenizer_config.json"),
    "lacks tokenizer.json or merges": remove("tokenizer.json", "merges.txt"),
    f"lacks {SHARDS[1]}, which": remove(SHARDS[1]),
    "lacks its weights: model.safetensors": remove("model.safetensors.index.json"),
    "model_type 'qwen2'": rewrite("config.json", '{"model_type": "qwen2"}'),
    "config.json is not JSON": rewrite("config.json", "{"),
    "holds a JSON list": rewrite("config.json", "[]"),
    "an LFS pointer": rewrite(SHARDS[0], "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "is cut off": lambda folder: os.truncate(folder / SHARDS[0], 70),
    "lacks b, which": lambda folder: shutil.copyfile(folder / SHARDS[0], folder / SHARDS[1]),
    "gives <box> the id 5": set_ids("added_tokens.json", **{"<box>": 5}),
    "lacks <0>": lambda folder: [
        (folder / name).write_text((folder / name).read_text().replace('"<0>"', '"<-0>"'))
        for name in ("added_tokens.json", "tokenizer.json", "tokenizer_config.json")
    ],
    "none_token_id is not that of the word": set_none,
}


@pytest.mark.parametrize("message", BROKEN)
def test_unusable_base_is_refused_and_nothing_is_written(base, target, message, capsys):
    BROKEN[message](base)
    assert main(["--base", str(base), "--local-dir", str(target)]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error
    assert not target.parent.exists()


def test_base_that_is_not_there(tmp_path, target, base, monkeypatch):
    with pytest.raises(HubError, match="neither a folder nor a hub repository"):
        assemble(tmp_path / "absent", target)
    with pytest.raises(HubError, match=r"revision.*'main'"):
        assemble(base, target, revision="main")


def test_hub_id_is_checked_before_its_weights_are_downloaded(base, target, monkeypatch):
    from types import SimpleNamespace

    files = [SimpleNamespace(rfilename=name, size=len(data)) for name, data in contents(base).items()]
    asked = []

    class Api:
        def model_info(self, repo, revision, **_kwargs):
            return SimpleNamespace(sha="c0ffee", siblings=files)

    def download(repo, revision, allow_patterns):
        asked.append((revision, SHARDS[0] in allow_patterns))
        assert not [name for name in allow_patterns if name.endswith(".py") or name.startswith(("checkpoint", ".env"))]
        return str(base)

    monkeypatch.setattr(hub.assembly, "HfApi", Api)
    monkeypatch.setattr(hub.assembly, "snapshot_download", download)
    assemble("some/model", target, revision="main")
    assert asked == [("c0ffee", False), ("c0ffee", True)]
    assert open_base("some/model", download=False).commit == "c0ffee" and len(asked) == 3
    (base / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(HubError, match="model_type"):
        assemble("some/model", target.with_name("other"))
    assert asked[3:] == [("c0ffee", False)]


def test_overwrite_replaces_model_folders_only(base, target):
    target.mkdir(parents=True)
    assemble(base, target)
    (target / "stale.txt").write_text("old")
    with pytest.raises(HubError, match="not empty"):
        assemble(base, target)
    assert (target / "stale.txt").exists()
    assemble(base, target, overwrite=True)
    assert not (target / "stale.txt").exists() and (base / SHARDS[0]).exists()
    assert os.listdir(target.parent) == ["built"]
    (target / "config.json").unlink()
    with pytest.raises(HubError, match="no model folder"):
        assemble(base, target, overwrite=True)
    (target.parent / "file").write_text("mine")
    with pytest.raises(HubError, match="is a file"):
        assemble(base, target.parent / "file", overwrite=True)


def test_overwrite_never_takes_the_files_that_the_base_links_to(base, target, capsys):
    first = assemble(base, target, weights="copy")
    second = assemble(first, target.with_name("linked"))
    before = contents(first)
    for options in ([], ["--dry-run"]):
        assert main(["--base", str(second), "--local-dir", str(first), "--overwrite", *options]) == 1
        assert f"local_dir: {first} holds" in capsys.readouterr().err
        assert contents(first) == before and not (first / SHARDS[0]).is_symlink()
    (second / ".notes").symlink_to(first / "README.md")  # which would not go along
    for name in SHARDS:
        (second / name).unlink()
        shutil.copy(first / name, second / name)
    assemble(second, first, overwrite=True)


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_base_is_never_built_over(base, place):
    before = contents(base)
    with pytest.raises(HubError, match="apart from the base"):
        assemble(base, base / place, overwrite=True)
    assert contents(base) == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["_write", "rename"])
def test_interrupted_build_leaves_what_was_there(base, target, monkeypatch, error, step):
    assemble(base, target)
    (target / "mark").write_text("the first build")
    place, rename, write = (hub.assembly if step == "_write" else Path), Path.rename, hub.assembly._write

    def fail(path, *others):
        if path.name in ("vocab.json", "new"):
            raise error
        return (rename if step == "rename" else write)(path, *others)

    monkeypatch.setattr(place, step, fail)
    with pytest.raises(type(error)):
        assemble(base, target, overwrite=True)
    assert (target / "mark").read_text() == "the first build"
    with pytest.raises(type(error)):
        assemble(base, target.with_name("other"))
    assert os.listdir(target.parent) == ["built"]


def test_command_line(base, target, capsys):
    assert main(["--base", str(base), "--local-dir", str(target), "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    actions = {line[2]: line[0] for line in lines[:-1]}
    expected = {SHARDS[0]: "link", "config.json": "edit", "vocab.json": "copy", "processing.py": "copy"}
    assert expected.items() <= actions.items() and "custom_generate/generate.py" not in actions
    assert not target.parent.exists()
    assert main(["assemble", "--base", str(base), "--local-dir", str(target), "--weights", "copy"]) == 0
    assert f'from_pretrained("{target}", trust_remote_code=True)' in capsys.readouterr().out
    assert not (target / SHARDS[0]).is_symlink()
    assert main(["--base", str(base), "--local-dir", str(target), "--overwrite"]) == 0
