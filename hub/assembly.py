# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""An official checkpoint and this project's code -> a folder that loads: which files, what is changed in them."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from hub.errors import HubError

PROJECT = Path(__file__).resolve().parent.parent
MODEL_ENTRIES = ("configuration", "modeling_locateanything_batched")
ENTRIES = (*MODEL_ENTRIES, "processing")

MODEL = "modeling_locateanything_batched.LocateAnythingBatchedForConditionalGeneration"
_PROCESSOR_MAP = {
    "AutoImageProcessor": "image_processing.LocateAnythingImageProcessor",
    "AutoProcessor": "processing.LocateAnythingProcessor",
}
AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "configuration.LocateAnythingConfig",
        "AutoModel": MODEL,
        "AutoModelForCausalLM": MODEL,
        "AutoModelForImageTextToText": MODEL,
    },
    "preprocessor_config.json": _PROCESSOR_MAP,
    "processor_config.json": _PROCESSOR_MAP,
}
# The tokens whose ids the config names, by its keys
TOKENS = {
    "<IMG_CONTEXT>": "image_token_index",
    "<box>": "box_start_token_id",
    "</box>": "box_end_token_id",
    "<ref>": "ref_start_token_id",
    "</ref>": "ref_end_token_id",
    "<0>": "coord_start_token_id",
    "<1000>": "coord_end_token_id",
    "<null>": "null_token_id",
    "<text_mask>": "text_mask_token_id",
    "<|im_end|>": "eos_token_id",
}
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
INDEX = "model.safetensors.index.json"
# What a training run leaves beside its model: folders and files that nobody loads
LEFTOVERS = (
    *("checkpoint-*", "global_step*", "runs", "wandb", "__pycache__", "events.out.tfevents*"),
    *("optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "training_args.*", "trainer_state.json"),
)

Content = bytes | Path  # of a file: what it shall hold, or the file that it is a copy of


@dataclass(frozen=True)
class Base:
    """An official-format checkpoint.

    name: as the user gave it. folder: what of it is on this machine. commit: None for a folder.
    sizes: bytes of each file that goes along, weights included.
    """

    name: str
    folder: Path
    commit: str | None
    sizes: dict[str, int]

    @property
    def is_drop_in(self) -> bool:
        """Whether its config.json names this project's code, in its own repository or in another."""
        named = read_json(self.folder / "config.json").get("auto_map") or {}
        return str(named.get("AutoModel")).split("--")[-1] == MODEL


def remote_code_files(entries: tuple[str, ...] = ENTRIES) -> list[Path]:
    """The files that transformers needs beside the weights: entry modules and all they import with `from .name`."""
    found: dict[str, Path] = {}
    todo = list(entries)
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = PROJECT / f"{name}.py"
            todo += re.findall(r"^\s*from \.(\w+) import", found[name].read_text(encoding="utf-8"), re.MULTILINE)
    return [found[name] for name in sorted(found)]


def assemble(
    base: str | os.PathLike[str],
    local_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    weights: str = "link",
    overwrite: bool = False,
) -> Path:
    """Build a folder that `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads with this project's code.

    All files of the base are kept except its Python files; `auto_map` and `architectures` are switched to this
    project's code, every other key stays as it is. The folder appears whole or not at all.

    Args:
        base: folder in the official format, or hub id.
        local_dir: folder to build.
        revision: branch, tag or commit of the hub id.
        weights: "link" for symbolic links where the file system has them, "copy" for a self-contained folder.
        overwrite: replace the model folder that stands at `local_dir`.

    Returns:
        The folder.

    Raises:
        HubError: the base lacks a file or is another model, or `local_dir` is in use; nothing was written.
        OSError, …: of the disk, the network and the hub's client.
    """
    if weights not in ("link", "copy"):
        raise HubError(f"weights: got {weights!r}, expected 'link' or 'copy'")
    target = check_target(base, local_dir, overwrite)
    build(plan(open_base(base, revision)), target, link=weights == "link")
    return target


def build(files: Mapping[str, Content], target: Path, *, link: bool = False) -> None:
    """Write a folder, in the place of one that stands there: whole or not at all; weights as links where it can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the last rename stays within one file system
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        built, old = Path(scratch, "new"), Path(scratch, "old")
        for name, content in files.items():
            _write(built / name, content, link and is_weights(name))
        if target.exists():
            target.rename(old)
        try:
            built.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise


def _write(path: Path, content: Content, link: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    if link:
        with contextlib.suppress(OSError):
            path.symlink_to(content.resolve())  # past the hub cache's own links, to the file itself
            return
    shutil.copyfile(content, path)


def check_target(base: str | os.PathLike[str], local_dir: str | os.PathLike[str], overwrite: bool) -> Path:
    """The absolute path of the folder to build, once it is sure that nothing of value stands there.

    Raises:
        HubError: something stands there that must not be replaced.
    """
    target, source = Path(local_dir).expanduser().resolve(), Path(base).expanduser().resolve()
    if source.is_dir() and (target.is_relative_to(source) or source.is_relative_to(target)):
        raise HubError(f"local_dir: got {local_dir}, expected a folder apart from the base {base}")
    if target.exists() and not target.is_dir():
        raise HubError(f"local_dir: {local_dir} is a file, expected a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise HubError(f"local_dir: {local_dir} is not empty; --overwrite (overwrite=True) replaces it")
        if not (target / "config.json").is_file() or PROJECT.is_relative_to(target):
            raise HubError(f"local_dir: {local_dir} is no model folder, so it is not replaced; empty it yourself")
        for path in source.rglob("*"):
            kept = path.is_file() and is_kept(path.relative_to(source).as_posix())
            if kept and path.resolve().is_relative_to(target):
                raise HubError(f"local_dir: {local_dir} holds what {path} of the base links to; it is not replaced")
    return target


def open_base(
    base: str | os.PathLike[str], revision: str | None = None, *, download: bool = True, hub_id: bool = False
) -> Base:
    """A checkpoint, examined before gigabytes are read or downloaded. Code of a hub id is never downloaded.

    Args:
        base: folder or hub id.
        revision: branch, tag or commit of the hub id.
        download: False leaves the weights of a hub id there, unexamined.
        hub_id: a folder of that name is not looked at.

    Returns:
        The checkpoint.

    Raises:
        HubError: there is no such folder or repository, or it lacks a file, or is another model.
    """
    folder = Path(base).expanduser()
    if not hub_id and folder.is_dir():
        if revision is not None:
            raise HubError(f"revision: got {revision!r} with the folder {base}, expected it only with a hub id")
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        sizes = {name: path.stat().st_size for name, path in paths.items() if is_kept(name)}
        found = Base(str(base), folder.resolve(), None, sizes)
        _check_data_files(found)
    else:
        found = _open_hub_id(str(base), revision)
        _check_data_files(found)
        if download:  # of the commit that was examined
            snapshot_download(found.name, revision=found.commit, allow_patterns=list(found.sizes))
    if download or found.commit is None:
        _check_weights(found)
    return found


def _open_hub_id(repo: str, revision: str | None) -> Base:
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise HubError(f"{repo} is neither a folder nor a hub repository that you can read") from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if is_kept(file.rfilename)}
    wanted = [name for name in sizes if not is_weights(name)]
    folder = snapshot_download(repo, revision=info.sha, allow_patterns=wanted)
    return Base(repo, Path(folder), str(info.sha), sizes)


def is_kept(name: str) -> bool:
    """Whether a base's file goes along: neither code nor hidden (tokens, settings of tools) nor left by a training."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") and part != ".gitattributes" for part in parts)
    left = any(fnmatchcase(part, pattern) for part in parts for pattern in LEFTOVERS)
    return not (hidden or left or name.endswith(".py"))


def is_weights(name: str) -> bool:
    """Whether a file's name is that of a file of weights."""
    return any(fnmatchcase(name, pattern) for pattern in WEIGHTS)


def _check_data_files(base: Base) -> None:
    """Make sure of a LocateAnything checkpoint's configs, and that its tokenizer is the one they speak of."""
    needed = [("config.json",), ("preprocessor_config.json", "processor_config.json"), ("tokenizer_config.json",)]
    needed += [("tokenizer.json", "vocab.json"), ("tokenizer.json", "merges.txt")]
    if missing := [" or ".join(names) for names in needed if not base.sizes.keys() & set(names)]:
        raise HubError(f"base: {base.name} lacks {', '.join(missing)}")
    config = read_json(base.folder / "config.json")
    if config.get("model_type") != "locateanything":
        raise HubError(f"base: {base.name} has model_type {config.get('model_type')!r}, expected 'locateanything'")
    told = {**config, **config.get("text_config", {})}
    expected = {key: value[0] if isinstance(value, list) and value else value for key, value in told.items()}
    found: dict[str, int] = {}
    for name in ("vocab.json", "added_tokens.json", "tokenizer.json", "tokenizer_config.json"):
        if name not in base.sizes:
            continue
        ids = _ids_by_token(name, read_json(base.folder / name))
        found.update(ids)
        for token, key in TOKENS.items():
            if token in ids and expected.get(key) not in (None, ids[token]):
                said = f"{name} gives {token} the id {ids[token]}, config.json's {key} is {expected[key]}"
                raise HubError(f"base: {base.name}: {said}; the tokenizer is another model's")
    if absent := [token for token in TOKENS if token not in found]:
        raise HubError(f"base: {base.name}: its tokenizer lacks {absent[0]}; it is another model's")
    nones = [index for word, index in found.items() if word.strip("Ġ").lower() == "none"]
    if expected.get("none_token_id") not in (None, *nones):
        raise HubError(f"base: {base.name}: config.json's none_token_id is not that of the word, {nones}")


def _ids_by_token(name: str, data: dict[str, Any]) -> dict[str, int]:
    """Of any of the four files that may hold them."""
    if name == "tokenizer_config.json":
        return {entry["content"]: int(index) for index, entry in data.get("added_tokens_decoder", {}).items()}
    if name == "tokenizer.json":
        return {**data["model"]["vocab"], **{entry["content"]: entry["id"] for entry in data["added_tokens"]}}
    return data


def _check_weights(base: Base) -> None:
    """Make sure that each file of weights is there and whole, by its header."""
    names: dict[str, set[str]] = {"model.safetensors": set()}  # tensors by file
    if "model.safetensors" not in base.sizes:
        if INDEX not in base.sizes:
            raise HubError(f"base: {base.name} lacks its weights: model.safetensors or {INDEX}")
        names = {}
        for tensor, file in read_json(base.folder / INDEX)["weight_map"].items():
            names.setdefault(file, set()).add(tensor)
    if missing := sorted(names.keys() - base.sizes.keys()):
        raise HubError(f"base: {base.name} lacks {', '.join(missing)}, which {INDEX} names")
    for file, tensors in names.items():
        try:
            with safe_open(base.folder / file, "pt") as opened:
                absent = sorted(tensors - set(opened.keys()))
        except SafetensorError as error:
            raise HubError(f"base: {base.folder / file} is cut off, an LFS pointer, or else ({error})") from error
        if absent:
            raise HubError(f"base: {base.folder / file} lacks {absent[0]}, which {INDEX} looks for there")


def plan(base: Base, code_repo: str | None = None) -> dict[str, Content]:
    """What each file of the folder shall hold.

    Args:
        base: the checkpoint.
        code_repo: hub id of the repository that `auto_map` shall name; None when the code is beside it.

    Returns:
        Contents by name, sorted. Weights of a hub id may not be on this machine yet.
    """
    files: dict[str, Content] = {name: base.folder / name for name in base.sizes}
    for name in files.keys() & {*AUTO_MAPS, "tokenizer_config.json"}:
        files[name] = edited(base.folder / name, partial(switch_auto_map, name, code_repo))
    # The base's LICENSE speaks of its weights and stays what it is
    files |= {path.name: path for path in remote_code_files()} | {"LICENSE-CODE": PROJECT / "LICENSE"}
    return dict(sorted(files.items()))


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A JSON file's content with a change made; laid out as transformers does, so in its files other bytes stay."""
    text, data = path.read_text(encoding="utf-8"), read_json(path)
    change(data)
    end = text[len(text.rstrip()) :]
    return (json.dumps(data, indent=2, ensure_ascii=text.isascii()) + end).encode()


def switch_auto_map(name: str, code_repo: str | None, data: dict[str, Any]) -> None:
    """Point one JSON file of a checkpoint to this project's code."""
    where = f"{code_repo}--" if code_repo else ""
    ours = {auto: where + reference for auto, reference in AUTO_MAPS.get(name, _PROCESSOR_MAP).items()}
    for part in (data, *data.values()):
        if isinstance(part, dict) and "auto_map" in part:
            # The published vision_config names code in a third repository, which must not be followed
            known = {} if name == "config.json" else ours
            part["auto_map"] = {auto: known[auto] for auto in part["auto_map"] or () if auto in known}
    if name in AUTO_MAPS:
        data["auto_map"] = ours
        # By it, transformers 4.57 looks for a fast class of its own, and torchvision, before it reads `auto_map`
        data.pop("image_processor_type", None)
    if name == "config.json":
        data["architectures"] = [MODEL.split(".")[-1]]


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a checkpoint holds.

    Raises:
        HubError: the file holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubError(f"base: {path} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise HubError(f"base: {path} holds a JSON {type(data).__name__}, expected an object")
    return data


def print_files(files: Mapping[str, Content], base: Base, *, link: bool = False) -> None:
    """Print a line for each file that a command would write: what becomes of it, its size, its name."""
    for name, content in files.items():
        action = "edit" if isinstance(content, bytes) else "link" if link and is_weights(name) else "copy"
        size = len(content) if isinstance(content, bytes) else base.sizes.get(name) or content.stat().st_size
        print(f"{action}  {tqdm.format_sizeof(size, 'B'):>7}  {name}")
