# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Build a loadable model folder out of an official LocateAnything checkpoint and this project's code.

`python upload_to_hub.py --base nvidia/LocateAnything-3B --local-dir LocateAnything-3B-batched` builds it: the base's
own files, the `auto_map` of its JSON files switched to the remote code that is put beside them.
"""

import argparse
import ast
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from tqdm.auto import tqdm

PROJECT = Path(__file__).resolve().parent
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
SKIPPED_FOLDERS = {".git", ".cache", "__pycache__"}
LFS_HEADER = b"version https://git-lfs.github.com/spec/"


class AssemblyError(ValueError):
    """The base or the target folder cannot be used; the message names the argument, what came, what was expected."""


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
    return str((config.get("auto_map") or {}).get("AutoModel")).split("--")[-1] == _MODEL


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
    folder = Path(base).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise AssemblyError(f"revision: got {revision!r} with the folder {base}, expected it only with a hub id")
        return folder.resolve()
    ignored = ["*.py"] if weights else ["*.py", *WEIGHT_PATTERNS]
    with _hub_errors(base, revision):
        return Path(snapshot_download(str(base), revision=revision, ignore_patterns=ignored))


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
    _check_data_files(open_base(folder))
    # A snapshot is named by its commit, which stays although the branch may move meanwhile
    return folder if Path(base).expanduser().is_dir() else fetch_base(base, folder.name)


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
    target = _check_target(base, local_dir, overwrite)
    steps = plan(open_base(fetch_checked(base, revision)), weights)

    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, so that the last rename stays within one file system
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
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
    """List the files of a checkpoint that a folder built on it keeps: all but Python code and tools' own folders."""
    sizes: dict[str, int] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for path in sorted(Path(parent, name) for name in names):
            # A link to nowhere is a missing file
            if path.suffix != ".py" and path.is_file():
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return Base(folder, sizes)


def plan(base: Base, weights: str = "link") -> list[Step]:
    """Decide what becomes of every file, after checking that the base is whole.

    Args:
        base: the checkpoint.
        weights: "link" or "copy".

    Returns:
        The steps, in the order of the folder's listing.

    Raises:
        AssemblyError: the base lacks a file or is another model.
    """
    if weights not in ("link", "copy"):
        raise AssemblyError(f"weights: got {weights!r}, expected 'link' or 'copy'")
    _check_data_files(base)
    _check_weights(base)
    steps = []
    for name, size in base.sizes.items():
        source = base.folder / name
        if name in AUTO_MAPS or name == "tokenizer_config.json":
            content = switch_auto_map(name, source.read_text(encoding="utf-8")).encode()
            steps.append(Step("edit", name, len(content), content=content))
        else:
            steps.append(Step(weights if _is_weights(name) else "copy", name, size, source))
    code = {path.name: path for path in remote_code_files()}
    # The base's LICENSE speaks of its weights and stays what it is
    code["LICENSE-CODE"] = PROJECT / "LICENSE"
    steps = [step for step in steps if step.name not in code]
    steps += [Step("code", name, path.stat().st_size, path) for name, path in code.items()]
    return sorted(steps, key=lambda step: step.name)


def switch_auto_map(name: str, text: str) -> str:
    """Point one JSON file of a checkpoint to this project's code, and change nothing else in it.

    Args:
        name: the file's name: a key of `AUTO_MAPS`, or tokenizer_config.json.
        text: what the file holds.

    Returns:
        What it shall hold.
    """
    data = json.loads(text)
    if name == "tokenizer_config.json":
        if "auto_map" not in data:
            return text
        ours = {key: value for maps in AUTO_MAPS.values() for key, value in maps.items()}
        data["auto_map"] = {key: ours[key] for key in data["auto_map"] if key in ours}
    else:
        data["auto_map"] = AUTO_MAPS[name]
    if name == "config.json":
        data["architectures"] = [_MODEL.split(".")[-1]]
        for part in data.values():
            # The published vision_config names code in a third repository, which must not be followed
            if isinstance(part, dict):
                part.pop("auto_map", None)
    end = "\n" if text.endswith("\n") else ""
    return json.dumps(data, indent=2, ensure_ascii=text.isascii()) + end


def print_plan(steps: list[Step], base: Base, target: Path) -> None:
    """Print what `assemble` would do, one line a file."""
    for step in steps:
        origin = f"  <- {step.source}" if step.source else ""
        print(f"{step.action:<5} {_readable(step.size):>10}  {step.name}{origin}")
    written = sum(step.size for step in steps if step.action != "link")
    print(f"{len(steps)} files of {base.folder} -> {target}, {_readable(written)} to write. Nothing was written.")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    try:
        if args.dry_run:
            target = _check_target(args.base, args.local_dir, args.overwrite)
            base = _preview_base(args.base, args.revision)
            print_plan(plan(base, args.weights), base, target)
            return 0
        target = assemble(
            args.base, args.local_dir, revision=args.revision, weights=args.weights, overwrite=args.overwrite
        )
    except (AssemblyError, OSError) as error:
        print(f"upload_to_hub.py: {error}", file=sys.stderr)
        return 1
    print(f"Built {target}. It loads with")
    print(f'    AutoModel.from_pretrained("{target}", trust_remote_code=True)')
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="upload_to_hub.py",
        description="Build a loadable folder out of an official LocateAnything checkpoint and this project's code.",
        epilog="""examples:
  python upload_to_hub.py --base nvidia/LocateAnything-3B --local-dir LocateAnything-3B-batched
  python upload_to_hub.py --base demo/checkpoint --local-dir demo-batched --weights copy
  python upload_to_hub.py --base nvidia/LocateAnything-3B --revision main --local-dir out --dry-run""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_argument_group("what to build on")
    source.add_argument("--base", required=True, help="folder in the official format, or hub id")
    source.add_argument("--revision", help="branch, tag or commit of the hub id")
    local = parser.add_argument_group("where to build")
    local.add_argument("--local-dir", required=True, metavar="DIR", help="folder to build")
    local.add_argument(
        "--weights",
        choices=("link", "copy"),
        default="link",
        help="link the base's weights where the file system can (default), or copy them",
    )
    local.add_argument("--overwrite", action="store_true", help="replace the model folder that stands at DIR")
    parser.add_argument("--dry-run", action="store_true", help="print files, sizes and operations, and do nothing")
    return parser


def _check_target(base: str | os.PathLike[str], local_dir: str | os.PathLike[str], overwrite: bool) -> Path:
    """The absolute path of the folder to build, once it is sure that nothing of value stands there."""
    target = Path(local_dir).expanduser().resolve()
    source = Path(base).expanduser()
    if source.is_dir() and (target.is_relative_to(source.resolve()) or source.resolve().is_relative_to(target)):
        raise AssemblyError(f"local_dir: got {local_dir}, expected a folder apart from the base {base}")
    if target.exists() and not target.is_dir():
        raise AssemblyError(f"local_dir: {local_dir} is a file, expected a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise AssemblyError(f"local_dir: {local_dir} is not empty; --overwrite (overwrite=True) replaces it")
        if not (target / "config.json").is_file() or PROJECT.is_relative_to(target):
            raise AssemblyError(f"local_dir: {local_dir} is no model folder, so it is not replaced; empty it yourself")
    return target


def _check_data_files(base: Base) -> None:
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
        needed = set(read_json(index).get("weight_map", {}).values())
    else:
        raise AssemblyError(f"base: {base.folder} lacks its weights: model.safetensors or {index.name}")
    if missing := sorted(needed - set(base.sizes)):
        raise AssemblyError(f"base: {base.folder} lacks {', '.join(missing)}, which {index.name} names")
    for name in sorted(needed):
        # A preview of a hub id has no weights to look into
        if base.sizes[name] < 1024 and (base.folder / name).is_file():
            with open(base.folder / name, "rb") as file:
                if file.read(len(LFS_HEADER)) == LFS_HEADER:
                    raise AssemblyError(f"base: {base.folder / name} is a Git LFS pointer; run `git lfs pull` there")


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
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AssemblyError(f"base: {path} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise AssemblyError(f"base: {path} holds a JSON {type(data).__name__}, expected an object")
    return data


def _preview_base(base: str, revision: str | None) -> Base:
    """As much of a base as a dry run needs: of a hub id the weights' names and sizes, not the weights."""
    preview = open_base(fetch_base(base, revision, weights=False))
    if not Path(base).expanduser().is_dir():
        with _hub_errors(base, revision):
            files = HfApi().model_info(base, revision=preview.folder.name, files_metadata=True).siblings or []
        preview.sizes.update({file.rfilename: file.size or 0 for file in files if _is_weights(file.rfilename)})
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


@contextlib.contextmanager
def _hub_errors(base: str | os.PathLike[str], revision: str | None) -> Iterator[None]:
    """Turn the hub client's errors into one line each."""
    try:
        yield
    except GatedRepoError as error:
        raise AssemblyError(f"base: {base} is gated; accept its terms on its page, then `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise AssemblyError(f"base: {base} is neither a folder nor a hub repository you can read") from error
    except RevisionNotFoundError as error:
        raise AssemblyError(f"revision: {base} has none named {revision!r}") from error
    # The client's transports share no base class across the supported hub versions
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AssemblyError(f"base: {base} is no folder, and the hub did not give it: {line}") from error


def _is_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS)


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
