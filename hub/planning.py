# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""A checkpoint and this project's code -> what a repository or a pull request shall hold, and what of it is there."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationCopy, HfApi

from hub.assembly import (
    AUTO_MAPS,
    Base,
    Step,
    check_data_files,
    code_steps,
    fetch_base,
    is_weights,
    open_base,
    plan,
    preview_base,
    read_json,
    readable_size,
    switch_auto_map,
)
from hub.card import CODE_ONLY, OWN, PULL_REQUEST, Origin, model_card, pull_request_description
from hub.errors import HubError, PublishError, hub_errors, is_missing

# What AutoConfig and AutoProcessor read
CODE_ONLY_FILES = (
    *AUTO_MAPS,
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
)


@dataclass(frozen=True)
class Publication:
    """What shall stand in a repository.

    kind: OWN, CODE_ONLY or PULL_REQUEST. steps: its files; a weights file without source is still on the hub.
    head: the commit that it goes on top of, None where there is no repository yet. there: what that commit holds.
    description: what the commit or the pull request says of itself.
    """

    kind: str
    repo: str
    origin: Origin
    steps: list[Step]
    oids: dict[str, str]
    head: str | None
    there: dict[str, Any]
    description: str

    @property
    def changes(self) -> list[Step]:
        """The steps whose outcome is not there yet, and the Python files that are there and must go."""
        changed = [step for step in self.steps if not self._is_there(step)]
        if self.kind != PULL_REQUEST:
            kept = {step.name for step in self.steps}
            for name, file in sorted(self.there.items()):
                if name.endswith(".py") and "/" not in name and name not in kept:
                    changed.append(Step("delete", name, file.size))
        return changed

    def _is_there(self, step: Step) -> bool:
        there = self.there.get(step.name)
        return there is not None and there.size == step.size and oid_of(there) == self._oid(step, bool(there.lfs))

    def _oid(self, step: Step, large: bool) -> str:
        if step.content is None and step.source is None:
            return self.oids[step.name]
        return content_oid(step.content if step.content is not None else step.source, large)


def plan_repository(
    base: str, repo: str, revision: str | None = None, *, kind: str = OWN, upload: bool = False
) -> Publication:
    """Decide what a repository of one's own shall hold.

    Args:
        base: folder in the official format, or hub id.
        repo: hub id of the repository, which need not exist.
        revision: branch, tag or commit of the base.
        kind: OWN, with the weights, or CODE_ONLY, without.
        upload: send the weights from here even where the hub could copy them.

    Returns:
        The plan; nothing was written, no weights were downloaded.

    Raises:
        AssemblyError: the base cannot be read or is no LocateAnything checkpoint.
        PublishError: the repository is the base itself or holds something else.
    """
    _check_repo_id(repo)
    local = Path(base).expanduser().is_dir()
    if not local and base == repo:
        raise PublishError(f"repo: {repo} is the base itself; open a pull request there, or name another repository")
    if local and kind == CODE_ONLY:
        raise PublishError(f"base: got the folder {base}, expected the hub id that the weights are loaded from")
    preview = preview_base(base, revision)
    steps = plan(preview, "copy", code_repo=repo if kind == CODE_ONLY else None)
    oids: dict[str, str] = {}
    if not local:
        with hub_errors("base", base, revision):
            oids = {name: oid_of(file) for name, file in listing(base, preview.folder.name)[1].items()}
    origin = _origin(base, None if local else preview.folder.name, preview)
    if kind == CODE_ONLY:
        # And the licences that these files are under
        kept = [*CODE_ONLY_FILES, *origin.legal_files]
        steps = [step for step in steps if step.action == "code" or any(fnmatch(step.name, name) for name in kept)]
    by_hub = not local and not upload and copies_across()
    steps = [_for_the_hub(step, by_hub) for step in steps if step.name != "README.md"]
    card = model_card(kind, repo, origin).encode()
    steps = sorted([*steps, Step("card", "README.md", len(card), content=card)], key=lambda step: step.name)
    head, there = target_of(repo, kind)
    # Not a folder's path, which is nobody's business
    description = f"From {origin.model_id or 'a folder'}" + (f" at {origin.commit}" if origin.commit else "")
    return Publication(kind, repo, origin, steps, oids, head, there, description)


def plan_pull_request(repo: str, revision: str | None = None) -> Publication:
    """Decide what a pull request changes: our files, and the `auto_map` of the JSON files; nothing else.

    Args:
        repo: hub id of a LocateAnything repository.
        revision: the commit to look at; the newest of main by default.

    Returns:
        The plan; nothing was written.

    Raises:
        AssemblyError: the repository cannot be read or is no LocateAnything checkpoint.
    """
    _check_repo_id(repo)
    with hub_errors("repo", repo, revision):
        head, there = listing(repo, revision)
    with _base_is_repo(repo):
        base = open_base(fetch_base(repo, head, weights=False))
        check_data_files(base)
    steps = code_steps()
    for name in (*AUTO_MAPS, "tokenizer_config.json"):
        if name in base.sizes:
            text = (base.folder / name).read_bytes().decode()
            content = switch_auto_map(name, text, only_auto_map=True).encode()
            steps.append(Step("edit", name, len(content), content=content))
    steps.sort(key=lambda step: step.name)
    description = pull_request_description(repo)
    return Publication(PULL_REQUEST, repo, _origin(repo, head, base), steps, {}, head, there, description)


def print_publication(publication: Publication, *, private: bool = False) -> None:
    """Print what `publish` would do, one line a file."""
    repo = publication.repo
    if publication.head is None:
        print(f"create {'private' if private else 'public'} repository {repo}")
    changes = {step.name: step for step in publication.changes}
    for step in sorted([*publication.steps, *(s for s in changes.values() if s.action == "delete")], key=_name):
        origin = f"  <- {step.source}" if step.source else ""
        if step.action in ("copy", "upload") and not step.source:
            origin = f"  <- {publication.origin.name} at {publication.origin.commit}"
        action = step.action if step.name in changes else "keep"
        print(f"{action:<6} {readable_size(step.size):>10}  {step.name}{origin}")
    target = "a new pull request" if publication.kind == PULL_REQUEST else "main"
    sent = sum(step.size for step in changes.values() if step.action not in ("copy", "delete"))
    print(
        f"One commit of {len(changes)} files to {repo}, {target}, on top of {publication.head or 'nothing'}, "
        f"{readable_size(sent)} to send. Nothing was written."
    )


def listing(repo: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """The commit that a revision of a repository names, and its files by name.

    Raises:
        RepositoryNotFoundError, …: as the hub's client raises them.
    """
    api = HfApi()
    commit = str(api.model_info(repo, revision=revision).sha)
    entries = api.list_repo_tree(repo, recursive=True, revision=commit)
    return commit, {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def target_of(repo: str, kind: str) -> tuple[str | None, dict[str, Any]]:
    """The commit and the files of the repository to write to, once it is sure that it is no other model's."""
    with hub_errors("repo", repo):
        try:
            head, there = listing(repo)
        except Exception as error:
            if is_missing(error):
                return None, {}
            raise
    if "config.json" in there:
        with _base_is_repo(repo):
            folder = fetch_base(repo, head, weights=False)
            found = read_json(folder / "config.json").get("model_type")
        if found != "locateanything":
            raise PublishError(f"repo: {repo} holds a model of type {found!r}, expected none or 'locateanything'")
    elif others := sorted(set(there) - {".gitattributes", "README.md"}):
        raise PublishError(f"repo: {repo} holds other files ({', '.join(others[:3])}), expected an empty repository")
    if kind == CODE_ONLY and (weights := [name for name in there if is_weights(name)]):
        raise PublishError(f"repo: {repo} holds weights ({weights[0]}); name another one for the code alone")
    return head, there


def content_oid(content: bytes | Path | None, large: bool) -> str:
    """What the hub calls a file's content: SHA-256 of a large file, git's hash of any other."""
    assert content is not None
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    digest = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % size)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with open(content, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def oid_of(file: Any) -> str:
    """The same of a file that the hub lists."""
    return str(file.lfs.sha256 if file.lfs else file.blob_id)


def copies_across() -> bool:
    """Whether the installed hub client can ask for copies from another repository (0.x cannot)."""
    return "src_repo_id" in {field.name for field in dataclasses.fields(CommitOperationCopy)}


def _for_the_hub(step: Step, by_hub: bool) -> Step:
    """A step of a folder as one of a repository."""
    if step.action != "copy":
        return step
    assert step.source is not None
    # The weights of a hub id are not on this machine before they are needed
    remote = is_weights(step.name) and not step.source.is_file()
    copied = by_hub and is_weights(step.name)
    return replace(step, action="copy" if copied else "upload", source=None if copied or remote else step.source)


@contextlib.contextmanager
def _base_is_repo(repo: str) -> Iterator[None]:
    """Errors of reading the repository that is written to, under its own name and not its snapshot's."""
    try:
        yield
    except HubError as error:
        text = re.sub(r"^base: \S*[/\\]snapshots[/\\]\w+", f"repo: {repo}", str(error))
        raise PublishError(text.replace("base:", "repo:", 1)) from error


def _check_repo_id(repo: str) -> None:
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise PublishError(f"repo: got {repo!r}, expected USER/NAME")


def _origin(name: str, commit: str | None, base: Base) -> Origin:
    card = base.folder / "README.md"
    return Origin(name, commit, base.sizes, card.read_text(encoding="utf-8") if card.is_file() else "")


def _name(step: Step) -> str:
    return step.name
