# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""A checkpoint and this project's code -> what a repository or a pull request shall hold, and what of it is there."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationCopy, HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hub.assembly import (
    AUTO_MAPS,
    Base,
    Step,
    check_data_files,
    code_steps,
    fetch_snapshot,
    is_code,
    is_weights,
    open_base,
    plan,
    preview_base,
    read_json,
    readable_size,
    switch_auto_map,
)
from hub.card import CODE_ONLY, OWN, PULL_REQUEST, Origin, is_as_made, model_card, origin_of, pull_request_description
from hub.errors import AssemblyError, HubError, PublishError, hub_errors, is_missing

TIMEOUT = 30.0  # seconds
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


# Read by transformers when they are there, so none of another base may stay
_READ = (*CODE_ONLY_FILES, "generation_config.json", "*.index.json")
_GENERATE = "custom_generate/generate.py"


@dataclass(frozen=True)
class Publication:
    """What shall stand in a repository.

    kind: OWN, CODE_ONLY or PULL_REQUEST. steps: its files; one without source and content is on the hub as in oids.
    head: the commit that it goes on top of, None where there is no repository yet. there: what that commit holds.
    description: what the commit or the pull request says of itself. former: files of the base that it was made of
    before. notes: what else to say of it. pull: the open pull request that it brings up to date.
    """

    kind: str
    repo: str
    origin: Origin
    steps: list[Step]
    oids: dict[str, str]
    head: str | None
    there: dict[str, Any]
    description: str
    former: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    pull: int | None = None

    @property
    def changes(self) -> list[Step]:
        """The steps whose outcome is not there yet, and the files that are there and must go."""
        changed = [step for step in self.steps if not self._is_there(step)]
        return changed + [Step("delete", name, self.there[name].size) for name in self.extra if self._must_go(name)]

    @property
    def extra(self) -> list[str]:
        """Files that are there and that the plan does not hold; none of a pull request, which leaves what it finds."""
        planned = {step.name for step in self.steps} | {".gitattributes"}
        return [] if self.kind == PULL_REQUEST else sorted(set(self.there) - planned)

    @property
    def others(self) -> list[str]:
        """Those of them that stay: neither code nor weights, nor what a base brought or transformers reads."""
        return [name for name in self.extra if not self._must_go(name)]

    def _must_go(self, name: str) -> bool:
        read = any(fnmatchcase(name, pattern) for pattern in _READ)
        brought = self.former.get(name) == oid_of(self.there[name])
        return read or brought or is_code(name) or is_weights(name)

    def _is_there(self, step: Step) -> bool:
        there = self.there.get(step.name)
        return there is not None and there.size == step.size and oid_of(there) == self._oid(step, bool(there.lfs))

    def _oid(self, step: Step, large: bool) -> str:
        if step.content is None and step.source is None:
            return self.oids[step.name]
        return content_oid(step.content if step.content is not None else step.source, large)


def plan_repository(
    base: str,
    repo: str,
    revision: str | None = None,
    *,
    kind: str = OWN,
    upload: bool = False,
    private: bool = False,
    commit: str | None = None,
) -> Publication:
    """Decide what a repository of one's own shall hold.

    Args:
        base: folder in the official format, or hub id; of CODE_ONLY, and with `commit`, always a hub id.
        repo: hub id of the repository, which need not exist.
        revision: branch, tag or commit of the base.
        kind: OWN, with the weights, or CODE_ONLY, without.
        upload: send the weights from here even where the hub could copy them.
        private: refuse a repository that is there and public.
        commit: what `revision` named, where that is known.

    Returns:
        The plan; nothing was written, no weights were downloaded.

    Raises:
        AssemblyError: the base cannot be read or is no LocateAnything checkpoint.
        PublishError: the repository is the base itself or holds something else.
    """
    _check_repo_id(repo)
    local = commit is None and Path(base).expanduser().is_dir()
    if kind == CODE_ONLY:
        if local and not _is_repo_id(base):
            raise PublishError(f"base: got the folder {base}, expected the hub id that the weights are loaded from")
        local = False
    if not local and base == repo:
        raise PublishError(f"repo: {repo} is the base itself; open a pull request there, or name another repository")
    oids: dict[str, str] = {}
    if not local:
        try:
            with hub_errors("base", base, revision):
                commit, files = listing(base, commit or revision)
        except HubError as error:
            if kind != CODE_ONLY or not Path(base).expanduser().is_dir():
                raise
            beside = "the folder of that name is not looked at, for `code` needs the weights' hub id"
            raise type(error)(f"{error} ({beside})") from error
        oids = {name: oid_of(file) for name, file in files.items()}
    preview = preview_base(base, revision if local else commit, local=local)
    steps = plan(preview, "copy", code_repo=repo if kind == CODE_ONLY else None)
    origin = _origin(base, commit, revision, preview)
    if kind == CODE_ONLY:
        # And the licences that these files are under
        legal = set(origin.legal_files)
        steps = [step for step in steps if step.action == "code" or step.name in legal or _is_code_only(step.name)]
    by_hub = not local and not upload and copies_across()
    steps = [_for_the_hub(step, by_hub) for step in steps if step.name != "README.md"]
    card = model_card(kind, repo, origin).encode()
    steps = sorted([*steps, Step("card", "README.md", len(card), content=card)], key=lambda step: step.name)
    head, there = target_of(repo, kind, private=private)
    former, notes = _before(repo, head, there)
    # Not a folder's path, which is nobody's business
    description = f"From {origin.model_id or 'a folder'}" + (f" at {origin.commit}" if origin.commit else "")
    return Publication(kind, repo, origin, steps, oids, head, there, description, former, notes)


def plan_pull_request(repo: str, revision: str | None = None) -> Publication:
    """Decide what a pull request changes: our files, and the `auto_map` of three JSON files; nothing else.

    Args:
        repo: hub id of a LocateAnything repository.
        revision: the commit to look at; the newest of main by default.

    Returns:
        The plan; nothing was written.

    Raises:
        AssemblyError: the repository cannot be read or is no LocateAnything checkpoint.
        PublishError: it holds no weights, or code that would run instead of this project's.
    """
    _check_repo_id(repo)
    with hub_errors("repo", repo, revision):
        head, there = listing(repo, revision)
    with _base_is_repo(repo):
        base = open_base(fetch_snapshot(repo, head, weights=False))
        check_data_files(base)
    if not {"model.safetensors", "model.safetensors.index.json"} & set(there):
        raise PublishError(
            f"repo: {repo} lacks weights (model.safetensors or its index), so nothing would load from it"
        )
    if _GENERATE in there:
        raise PublishError(
            f"repo: {repo} holds {_GENERATE}, which transformers runs in place of any model's generate; "
            "a pull request would not be heard"
        )
    steps = code_steps()
    for name in AUTO_MAPS:
        if name in base.sizes:
            text = (base.folder / name).read_bytes().decode()
            content = switch_auto_map(name, text, only_auto_map=True).encode()
            steps.append(Step("edit", name, len(content), content=content))
    steps.sort(key=lambda step: step.name)
    origin = Origin(repo, head, None, base.sizes, "")
    return Publication(PULL_REQUEST, repo, origin, steps, {}, head, there, pull_request_description(repo))


def print_publication(publication: Publication, *, private: bool = False) -> None:
    """Print what `publish` would do, one line a file."""
    repo = publication.repo
    if publication.head is None:
        print(f"create {'private' if private else 'public'} repository {repo}")
    changes = {step.name: step for step in publication.changes}
    deleted = [step for step in changes.values() if step.action == "delete"]
    for step in sorted([*publication.steps, *deleted], key=lambda step: step.name):
        origin = f"  <- {step.source}" if step.source else ""
        if step.action in ("copy", "upload") and not step.source:
            origin = f"  <- {publication.origin.name} at {publication.origin.commit}"
        action = step.action if step.name in changes else "keep"
        print(f"{action:<6} {readable_size(step.size):>10}  {step.name}{origin}")
    for line in warnings_of(publication):
        print(line)
    target = "main"
    if publication.kind == PULL_REQUEST:
        target = f"refs/pr/{publication.pull}, which is open" if publication.pull else "a new pull request"
    sent = sum(step.size for step in changes.values() if step.action not in ("copy", "delete"))
    print(
        f"One commit of {len(changes)} files to {repo}, {target}, on top of {publication.head or 'nothing'}, "
        f"{readable_size(sent)} to send."
    )
    read = "" if publication.origin.commit is None else "Configs and tokenizer were downloaded to the hub's cache. "
    print(f"{read}Nothing was published.")


def warnings_of(publication: Publication) -> list[str]:
    """What publishing does to files that are there and are not this project's."""
    deleted = [step.name for step in publication.changes if step.action == "delete"]
    return [
        *publication.notes,
        *(f"deletes {name}, which is not part of this publication" for name in deleted),
        *(f"leaves {name}, which is not part of this publication" for name in publication.others),
    ]


def listing(repo: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """The commit that a revision of a repository names, and its files by name.

    Raises:
        RepositoryNotFoundError, …: as the hub's client raises them.
    """
    api = HfApi()
    # The first request of each command, and so the one that notices a hub that says nothing
    commit = str(api.model_info(repo, revision=revision, timeout=TIMEOUT).sha)
    entries = api.list_repo_tree(repo, recursive=True, revision=commit)
    return commit, {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def target_of(repo: str, kind: str, *, private: bool = False) -> tuple[str | None, dict[str, Any]]:
    """The commit and the files of the repository to write to, once it is sure that it is no other model's."""
    with hub_errors("repo", repo):
        try:
            head, there = listing(repo)
            public = private and not HfApi().model_info(repo, timeout=TIMEOUT).private
        except Exception as error:
            if is_missing(error):
                return None, {}
            raise
    if public:
        raise PublishError(
            f"private: {repo} is there and public; make it private in its settings, or name another one"
        )
    if "config.json" in there:
        with _base_is_repo(repo):
            folder = fetch_snapshot(repo, head, weights=False)
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


def _is_repo_id(repo: str) -> bool:
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return repo.count("/") == 1


def _check_repo_id(repo: str) -> None:
    if not _is_repo_id(repo):
        raise PublishError(f"repo: got {repo!r}, expected USER/NAME, of letters, digits, '-', '_' and '.'")


def _is_code_only(name: str) -> bool:
    return not is_weights(name) and any(fnmatchcase(name, pattern) for pattern in CODE_ONLY_FILES)


def _before(repo: str, head: str | None, there: dict[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """What the base that a repository was made of before brought, and what to say of its card."""
    if "README.md" not in there:
        return {}, ()
    card = card_of(repo, head)
    named = origin_of(card)
    former: dict[str, str] = {}
    if named is not None:
        # It may be gone since; what it brought then stays, and is said to
        with contextlib.suppress(HubError), hub_errors("base", named[0], named[1]):
            former = {name: oid_of(file) for name, file in listing(*named[:2])[1].items()}
    return former, () if is_as_made(card) else ("replaces README.md, which was written or edited by somebody else",)


def card_of(repo: str, head: str | None) -> str:
    """A repository's README.md, whatever its bytes."""
    with hub_errors("repo", repo, head):
        return Path(hf_hub_download(repo, "README.md", revision=head)).read_bytes().decode(errors="replace")


def _origin(name: str, commit: str | None, revision: str | None, base: Base) -> Origin:
    card = base.folder / "README.md"
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
    except UnicodeDecodeError as error:
        raise AssemblyError(f"base: {card} is not UTF-8 ({error})") from error
    return Origin(name, commit, revision, base.sizes, text)
