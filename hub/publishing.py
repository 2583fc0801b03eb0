# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""A checkpoint and this project's code -> one commit on the hub: a repository of one's own, or a pull request.

`create_commit` leaves out what is there already and sends large files before the commit, which comes last: an
interrupted run has published nothing, and the next one goes on.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download

from hub.assembly import (
    AUTO_MAPS,
    MODEL,
    MODEL_ENTRIES,
    WEIGHTS,
    Base,
    Content,
    edited,
    is_weights,
    open_base,
    plan,
    print_files,
    read_json,
    remote_code_files,
    switch_auto_map,
)
from hub.card import MARK, is_legal, model_card, pull_request_description
from hub.errors import HubError

TITLE = "Batched generate for any number of rows"
# What AutoConfig and AutoProcessor read
_READ = (*AUTO_MAPS, "tokenizer*", "vocab.*", "merges.txt", "*_tokens*.json", "chat_template*")
# What loading reads when it is there: of other code or another base, it must go
_STALE = ("*.py", *WEIGHTS, *_READ, "generation_config.json", "*.index.json")


@dataclass(frozen=True)
class Publication:
    """One commit to come.

    files: contents by name. delete: names. notes: what to say of files that are there. head: the commit that it goes
    on top of, None where there is no repository yet. pull: whether it opens a pull request.
    """

    repo: str
    base: Base
    files: dict[str, Content]
    delete: list[str]
    notes: list[str]
    head: str | None
    title: str
    description: str
    pull: bool = False


def plan_repository(
    base: str, repo: str, revision: str | None = None, *, code_only: bool = False, private: bool = False
) -> Publication:
    """Decide what a repository of one's own shall hold; nothing is written, no weights of a hub id are downloaded.

    Args:
        base: folder in the official format, or hub id; with `code_only` always a hub id.
        repo: hub id of the repository, which need not exist.
        revision: branch, tag or commit of the base.
        code_only: without the weights, which are loaded from the base.
        private: refuse a repository that is there and public.

    Raises:
        HubError: the base is no LocateAnything checkpoint, or the repository holds something else.
    """
    if base == repo:
        raise HubError(f"repo: {repo} is the base itself; open a pull request there, or name another repository")
    found = open_base(base, revision, download=False, hub_id=code_only)
    files = plan(found, code_repo=repo if code_only else None)
    if code_only:
        kept = {path.name for path in remote_code_files()} | {"LICENSE-CODE"} | set(filter(is_legal, found.sizes))
        files = {name: content for name, content in files.items() if name in kept or _is_any(name, _READ)}
    files["README.md"] = model_card(found, repo, revision, code_only=code_only).encode()
    head, there = _look_at(repo, code_only, private)
    notes = []
    if "README.md" in there and MARK not in Path(hf_hub_download(repo, "README.md", revision=head)).read_text("utf-8"):
        del files["README.md"]
        notes.append("leaves README.md, which this script did not write; see that it names the base's licence")
    stale = sorted(name for name in there - files.keys() if _is_any(name, _STALE))
    notes += [f"deletes {name}, which would be read beside this" for name in stale]
    description = f"Made of {found.name} at {found.commit}" if found.commit else "Made of a folder"
    return Publication(repo, found, files, stale, notes, head, TITLE, description)


def plan_pull_request(repo: str, variant: str = "default", project_url: str | None = None) -> Publication:
    """Decide what a pull request changes: our files, and entries of `auto_map`; nothing else.

    Args:
        repo: hub id of a LocateAnything repository.
        variant: "default" switches AutoModel; "opt-in" adds AutoModelForImageTextToText and switches nothing;
            "processor" switches AutoModel and the processor's classes.
        project_url: where this project lives, for the description.

    Raises:
        HubError: it is no LocateAnything checkpoint, or holds other code under our files' names.
    """
    base = open_base(repo, download=False, hub_id=True)
    code = remote_code_files() if variant == "processor" else remote_code_files(MODEL_ENTRIES)
    there = set(HfApi().list_repo_files(repo, revision=base.commit))
    config = base.folder / "config.json"
    if MODEL not in config.read_text(encoding="utf-8") and (clash := sorted({path.name for path in code} & there)):
        raise HubError(f"repo: {repo} has a {clash[0]} of its own, where this project's file goes")

    def name_the_model(data: dict[str, Any]) -> None:
        named = data.setdefault("auto_map", {})
        switched = [] if variant == "opt-in" else ["AutoModel", *(auto for auto in named if "AutoModelFor" in auto)]
        named.update(dict.fromkeys([*switched, "AutoModelForImageTextToText"], MODEL))

    files: dict[str, Content] = {path.name: path for path in code}
    files["config.json"] = edited(config, name_the_model)
    if variant == "processor":
        for name in AUTO_MAPS.keys() & base.sizes.keys() - {"config.json"}:
            files[name] = edited(base.folder / name, partial(switch_auto_map, name, None))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in code)
    description = pull_request_description(repo, variant, len(code), lines, project_url)
    title = TITLE if variant == "default" else f"{TITLE} ({variant})"
    return Publication(repo, base, files, [], [], base.commit, title, description, pull=True)


def publish(publication: Publication, *, private: bool = False) -> tuple[str, str | None]:
    """Make a plan true: create the repository if there is none, send large files, and commit everything at once.

    A pull request that this user has open under the same title gets the commit, else a new one.

    Args:
        publication: the plan.
        private: make a new repository private.

    Returns:
        What came of it, for people, and the revision where it is, None for main.

    Raises:
        HubError, OSError, …: the hub refuses or cannot be reached. No revision has changed; the next run goes on.
    """
    api, repo, base = HfApi(), publication.repo, publication.base
    user = api.whoami()["name"]  # before gigabytes are downloaded
    create_pr, head, revision = publication.pull, publication.head, None
    if publication.pull:
        pulls = api.get_repo_discussions(repo, author=user, discussion_type="pull_request", discussion_status="open")
        if number := next((pull.num for pull in pulls if pull.title == publication.title), None):
            create_pr, revision = False, f"refs/pr/{number}"
            head = api.model_info(repo, revision=revision).sha
    elif head is None:
        api.create_repo(repo, private=private, exist_ok=True)
    if base.commit is not None and any(map(is_weights, publication.files)):
        open_base(base.name, base.commit, hub_id=True)  # to this machine
    commit = api.create_commit(
        repo,
        [
            *(CommitOperationDelete(name) for name in publication.delete),
            *(CommitOperationAdd(name, content) for name, content in publication.files.items()),
        ],
        commit_message=publication.title,
        commit_description=publication.description,
        create_pr=create_pr,
        revision=revision,
        parent_commit=head,
    )
    if commit.oid == head:
        return f"Already there, and up to date: {constants.ENDPOINT}/{repo}", revision
    return f"Published {commit.pr_url or commit.commit_url}", revision or commit.pr_revision


def print_publication(publication: Publication, *, private: bool = False) -> None:
    """Print what `publish` would do, one line a file; it leaves out what is there already."""
    if publication.head is None:
        print(f"create {'private' if private else 'public'} repository {publication.repo}")
    print_files(publication.files, publication.base)
    for line in publication.notes:
        print(line)
    place = "a new pull request" if publication.pull else "main"
    print(f"One commit to {publication.repo}, {place}, on top of {publication.head}. Nothing was published.")


def _look_at(repo: str, code_only: bool, private: bool) -> tuple[str | None, set[str]]:
    """The commit and the file names of the repository to write to, once it is sure that it is no other model's."""
    api = HfApi()
    if not api.repo_exists(repo):
        return None, set()
    info = api.model_info(repo)
    there = {file.rfilename for file in info.siblings or []}
    if private and not info.private:
        raise HubError(f"private: {repo} is there and public; make it private in its settings, or name another one")
    if code_only and any(map(is_weights, there)):
        raise HubError(f"repo: {repo} holds weights; name another one for the code alone")
    found: Any = "locateanything"
    if "config.json" in there:
        found = read_json(Path(hf_hub_download(repo, "config.json", revision=info.sha))).get("model_type")
    elif there - {".gitattributes", "README.md"}:
        found = "unknown"
    if found != "locateanything":
        raise HubError(f"repo: {repo} holds a model of type {found!r}, expected none or 'locateanything'")
    return str(info.sha), there


def _is_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
