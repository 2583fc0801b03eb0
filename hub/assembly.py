# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""An official checkpoint and this project's code -> a folder that loads: which files, what is changed in them."""

import ast
import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch, fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from tqdm.auto import tqdm

from hub.errors import AssemblyError, hub_errors

PROJECT = Path(__file__).resolve().parent.parent
ENTRY_MODULES = ("configuration", "modeling_locateanything_batched", "processing")

_MODEL = "modeling_locateanything_batched.LocateAnythingBatchedForConditionalGeneration"
_PROCESSOR_MAP = {
    "AutoImageProcessor": "processing.LocateAnythingImageProcessor",
    "AutoProcessor": "processing.LocateAnythingProcessor",
}
AUTO_MAPS: dict[str, dict[str, str]] = {
    "config.json": {
        "AutoConfig": "configuration.LocateAnythingConfig",
        "AutoModel": _MODEL,
        "AutoModelForCausalLM": _MODEL,
        "AutoModelForImageTextToText": _MODEL,
    },
    "preprocessor_config.json": _PROCESSOR_MAP,
    "processor_config.json": _PROCESSOR_MAP,
}
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
# What a training run leaves beside its model: folders and files that nobody loads
LEFTOVERS = (
    *("checkpoint-*", "global_step*", "runs", "wandb", "__pycache__", "events.out.tfevents*"),
    *("optimizer.*", "scheduler.*", "scaler.*", "rng_state*", "training_args.*", "trainer_state.json"),
)
LFS_HEADER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Step:
    """One file of the folder to build: `source` is linked or copied, or `content` is written."""

    action: str  # link, copy, edit or code, as --dry-run prints it
    name: str
    size: int
    source: Path | None = None
    content: bytes | None = None


@dataclass(frozen=True)
class Base:
    """An official-format checkpoint on disk: its folder and the size of each file that is kept of it."""

    folder: Path
    sizes: dict[str, int]


def remote_code_files() -> list[Path]:
    """The files that transformers needs beside the weights: the entry modules and all they import with `from .name`.

    Returns:
        Paths in this project, sorted by name.

    Raises:
        FileNotFoundError: a module that is imported does not exist.
    """
    found: dict[str, Path] = {}
    todo = list(ENTRY_MODULES)
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found[name] = PROJECT / f"{name}.py"
        tree = ast.parse(found[name].read_text(encoding="utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        todo += [node.module for node in imports if node.module]
    return [found[name] for name in sorted(found)]


def is_drop_in(config: dict[str, Any]) -> bool:
    """Whether a checkpoint's config.json names this project's code (in its own repository or in another)."""
    named = config.get("auto_map")
    return isinstance(named, dict) and str(named.get("AutoModel")).split("--")[-1] == _MODEL


def fetch_base(base: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: `base` itself, or the downloaded snapshot of a hub id.

    Args:
        base: folder or hub id.
        revision: branch, tag or commit of the hub id.
        weights: False leaves the weights of a hub id where they are.

    Returns:
        The folder. Remote code of a hub id is never downloaded.

    Raises:
        AssemblyError: there is no such folder or repository, or it cannot be downloaded.
    """
    try:
        folder = Path(base).expanduser()
        found = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise AssemblyError(f"base: {str(base)[:80]!r} is no path ({error})") from error
    if found:
        if revision is not None:
            raise AssemblyError(f"revision: got {revision!r} with the folder {base}, expected it only with a hub id")
        return folder.resolve()
    return fetch_snapshot(str(base), revision, weights=weights)


def fetch_snapshot(repo: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """`fetch_base` of what is known to be a hub id: a folder of the same name is not looked at."""
    ignored = ["*.py"] if weights else ["*.py", *WEIGHT_PATTERNS]
    with hub_errors("base", repo, revision):
        return Path(snapshot_download(repo, revision=revision, ignore_patterns=ignored))


def fetch_checked(base: str | os.PathLike[str], revision: str | None = None) -> Path:
    """`fetch_base` with weights, of a LocateAnything checkpoint only: known before gigabytes are downloaded.

    Args:
        base: folder or hub id.
        revision: branch, tag or commit of the hub id.

    Returns:
        The folder.

    Raises:
        AssemblyError: as `fetch_base`, or the checkpoint lacks a data file or is another model.
    """
    folder = fetch_base(base, revision, weights=False)
    check_data_files(open_base(folder))
    # A snapshot is named by its commit, which stays although the branch may move meanwhile
    return folder if Path(base).expanduser().is_dir() else fetch_snapshot(str(base), folder.name)


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
        AssemblyError: the base lacks a file or is another model, or `local_dir` is in use; nothing was written.
    """
    target = check_target(base, local_dir, overwrite)
    steps = plan(open_base(fetch_checked(base, revision)), weights)

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that the last rename stays within one file system
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise AssemblyError(f"local_dir: {local_dir} cannot be made ({error})") from error
    try:
        built = scratch / "new"
        built.mkdir()
        for step in tqdm(steps, desc=f"assembling {target.name}", unit="file", disable=None, leave=False):
            _execute(step, built)
        if target.exists():
            target.rename(scratch / "old")
        try:
            built.rename(target)
        except BaseException:
            if (scratch / "old").exists():
                (scratch / "old").rename(target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def open_base(folder: Path) -> Base:
    """List the files of a checkpoint that a folder built on it keeps: those of `is_kept`."""
    sizes: dict[str, int] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if is_kept(name))
        for path in sorted(Path(parent, name) for name in names):
            # A link to nowhere is a missing file
            if is_kept(path.name) and path.is_file():
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return Base(folder, sizes)


def is_kept(name: str) -> bool:
    """Whether a base's file goes along: neither code nor hidden (tokens, settings of tools) nor left by a training."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") and part != ".gitattributes" for part in parts)
    left = any(fnmatchcase(part, pattern) for part in parts for pattern in LEFTOVERS)
    return not (hidden or left or is_code(name))


def is_code(name: str) -> bool:
    """Whether a file's name is that of Python code, which transformers may run wherever it lies."""
    return PurePosixPath(name).suffix == ".py"


def plan(base: Base, weights: str = "link", code_repo: str | None = None) -> list[Step]:
    """Decide what becomes of every file, after checking that the base is whole.

    Args:
        base: the checkpoint.
        weights: "link" or "copy".
        code_repo: hub id of the repository that `auto_map` shall name; None when the code is beside it.

    Returns:
        The steps, in the order of the folder's listing.

    Raises:
        AssemblyError: the base lacks a file or is another model.
    """
    if weights not in ("link", "copy"):
        raise AssemblyError(f"weights: got {weights!r}, expected 'link' or 'copy'")
    check_data_files(base)
    _check_weights(base)
    steps = []
    for name, size in base.sizes.items():
        source = base.folder / name
        if name in AUTO_MAPS or name == "tokenizer_config.json":
            content = switch_auto_map(name, source.read_bytes().decode(), code_repo).encode()
            steps.append(Step("edit", name, len(content), content=content))
        else:
            steps.append(Step(weights if is_weights(name) else "copy", name, size, source))
    code = code_steps()
    names = {step.name for step in code}
    folders = sorted({name.partition("/")[0] for name in base.sizes if "/" in name} & names)
    if folders:
        raise AssemblyError(f"base: {base.folder} has a folder {folders[0]}, where this project's file goes")
    steps = [step for step in steps if step.name not in names] + code
    return sorted(steps, key=lambda step: step.name)


def code_steps() -> list[Step]:
    """This project's part of a repository: the remote code and its licence."""
    code = {path.name: path for path in remote_code_files()}
    # The base's LICENSE speaks of its weights and stays what it is
    code["LICENSE-CODE"] = PROJECT / "LICENSE"
    return [Step("code", name, path.stat().st_size, path) for name, path in sorted(code.items())]


def switch_auto_map(name: str, text: str, code_repo: str | None = None, *, only_auto_map: bool = False) -> str:
    """Point one JSON file of a checkpoint to this project's code; every other byte of it stays.

    Args:
        name: the file's name: a key of `AUTO_MAPS`, or tokenizer_config.json.
        text: what the file holds.
        code_repo: hub id of the repository that holds the code; None when the code is beside the file.
        only_auto_map: leave config.json's `architectures` and the `auto_map` of its parts alone.

    Returns:
        What it shall hold.

    Raises:
        AssemblyError: the text is no JSON object, or names a key twice.
    """
    try:
        data = parse_json(text)
    except (RecursionError, ValueError) as error:
        raise AssemblyError(f"base: {name} is not JSON ({error})") from error
    where = f"{code_repo}--" if code_repo else ""
    ours = {file: {key: where + value for key, value in maps.items()} for file, maps in AUTO_MAPS.items()}
    if name == "tokenizer_config.json":
        named = data.get("auto_map")
        if named is None:
            return text
        if not isinstance(named, (dict, list)):
            raise AssemblyError(f"base: {name} has the auto_map {named!r}, expected an object")
        known = {key: value for maps in ours.values() for key, value in maps.items()}
        return _replaced(text, "auto_map", {key: known[key] for key in named if key in known})
    text = _replaced(text, "auto_map", ours[name])
    if name == "config.json" and not only_auto_map:
        text = _replaced(text, "architectures", [_MODEL.split(".")[-1]])
        for key, part in data.items():
            # The published vision_config names code in a third repository, which must not be followed
            if isinstance(part, dict) and "auto_map" in part and key != "auto_map":
                text = _replaced(text, key, {name: value for name, value in part.items() if name != "auto_map"})
    return text


def _replaced(text: str, key: str, value: Any) -> str:
    """A JSON object's text with the value of one top-level key replaced, or the key added in front."""
    decoder = json.JSONDecoder()
    end_of_line = "\r\n" if "\r\n" in text else "\n"
    shown = json.dumps(value, indent=2, ensure_ascii=text.isascii()).replace("\n", f"{end_of_line}  ")
    start = position = text.index("{") + 1
    while True:
        position = _past(text, position, ", \t\r\n")
        if text[position] == "}":
            comma = "," if json.loads(text) else end_of_line
            return f"{text[:start]}{end_of_line}  {json.dumps(key)}: {shown}{comma}{text[start:]}"
        found, position = decoder.raw_decode(text, position)
        position = _past(text, position, ": \t\r\n")
        _, end = decoder.raw_decode(text, position)
        if found == key:
            return text[:position] + shown + text[end:]
        position = end


def _past(text: str, position: int, skipped: str) -> int:
    while text[position] in skipped:
        position += 1
    return position


def print_plan(steps: list[Step], base: Base, target: Path) -> None:
    """Print what `assemble` would do, one line a file."""
    for step in steps:
        origin = f"  <- {step.source}" if step.source else ""
        print(f"{step.action:<5} {readable_size(step.size):>10}  {step.name}{origin}")
    written = sum(step.size for step in steps if step.action != "link")
    print(f"{len(steps)} files of {base.folder} -> {target}, {readable_size(written)} to write. Nothing was written.")


def check_target(base: str | os.PathLike[str], local_dir: str | os.PathLike[str], overwrite: bool) -> Path:
    """The absolute path of the folder to build, once it is sure that nothing of value stands there.

    Raises:
        AssemblyError: something stands there that must not be replaced.
    """
    if not str(local_dir):
        raise AssemblyError("local_dir: got an empty text, expected a folder")
    try:
        target, source = Path(local_dir).expanduser().resolve(), Path(base).expanduser()
        stands, is_folder = target.exists(), source.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a null byte, nobody's home
        raise AssemblyError(
            f"local_dir {str(local_dir)[:80]!r}, base {str(base)[:80]!r}: no paths ({error})"
        ) from error
    if is_folder and (target.is_relative_to(source.resolve()) or source.resolve().is_relative_to(target)):
        raise AssemblyError(f"local_dir: got {local_dir}, expected a folder apart from the base {base}")
    if stands and not target.is_dir():
        raise AssemblyError(f"local_dir: {local_dir} is a file, expected a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise AssemblyError(f"local_dir: {local_dir} is not empty; --overwrite (overwrite=True) replaces it")
        if not (target / "config.json").is_file() or PROJECT.is_relative_to(target):
            raise AssemblyError(f"local_dir: {local_dir} is no model folder, so it is not replaced; empty it yourself")
    return target


def check_data_files(base: Base) -> None:
    """Make sure that a folder holds a LocateAnything checkpoint's configs and tokenizer.

    Raises:
        AssemblyError: a file is missing or is not JSON, or the model is another.
    """
    needed = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
    missing = [name for name in needed if name not in base.sizes]
    if "tokenizer.json" not in base.sizes:
        pair = [name for name in ("vocab.json", "merges.txt") if name not in base.sizes]
        missing += [f"{' and '.join(pair)} (or tokenizer.json)"] if pair else []
    if missing:
        raise AssemblyError(f"base: {base.folder} lacks {', '.join(missing)}")
    for name in (*AUTO_MAPS, "tokenizer_config.json"):
        if name in base.sizes:
            data = read_json(base.folder / name)
            if name == "config.json" and data.get("model_type") != "locateanything":
                raise AssemblyError(
                    f"base: {base.folder} has model_type {data.get('model_type')!r}, expected 'locateanything'"
                )


def _check_weights(base: Base) -> None:
    index = base.folder / "model.safetensors.index.json"
    if "model.safetensors" in base.sizes:
        needed = {"model.safetensors"}
    elif index.name in base.sizes:
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()) or not named:
            raise AssemblyError(f"base: {index} has no weight_map of tensors to files")
        needed = set(named.values())
    else:
        raise AssemblyError(f"base: {base.folder} lacks its weights: model.safetensors or {index.name}")
    if missing := sorted(needed - set(base.sizes)):
        raise AssemblyError(f"base: {base.folder} lacks {', '.join(missing)}, which {index.name} names")
    for name in sorted(needed):
        # A preview of a hub id has no weights to look into
        if (base.folder / name).is_file():
            with open(base.folder / name, "rb") as file:
                start = file.read(len(LFS_HEADER))
            if start == LFS_HEADER:
                raise AssemblyError(f"base: {base.folder / name} is a Git LFS pointer; run `git lfs pull` there")
            if not start:  # loading.py looks closer
                raise AssemblyError(f"base: {base.folder / name} is empty")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of a checkpoint holds.

    Args:
        path: the file.

    Returns:
        Its keys and values.

    Raises:
        AssemblyError: the file holds something else.
    """
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise AssemblyError(f"base: {path} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise AssemblyError(f"base: {path} holds a JSON {type(data).__name__}, expected an object")
    return data


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is not JSON, or an object names a key twice: readers disagree on which one counts.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"{next(key for key in found if keys.count(key) > 1)!r} twice in one object")
        return found

    return json.loads(text, object_pairs_hook=once)


def preview_base(base: str, revision: str | None, *, local: bool) -> Base:
    """As much of a base as a plan needs: of a hub id (not `local`) the weights' names and sizes, not the weights."""
    if local:
        return open_base(fetch_base(base, revision))
    preview = open_base(fetch_snapshot(base, revision, weights=False))
    with hub_errors("base", base, revision):
        files = HfApi().model_info(base, revision=preview.folder.name, files_metadata=True).siblings or []
    weights = {file.rfilename: file.size or 0 for file in files if is_weights(file.rfilename)}
    preview.sizes.update({name: size for name, size in weights.items() if is_kept(name)})
    return preview


def _execute(step: Step, folder: Path) -> None:
    path = folder / step.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if step.content is not None:
        path.write_bytes(step.content)
        return
    assert step.source is not None
    if step.action == "link":
        with contextlib.suppress(OSError):
            # Past the hub cache's own links, to the file itself
            path.symlink_to(step.source.resolve())
            return
    shutil.copyfile(step.source, path)


def is_weights(name: str) -> bool:
    """Whether a file's name is that of a file of weights."""
    return any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS)


def readable_size(size: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
