# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""A plan -> a commit on the hub. Large files go up first, where no revision shows them, and the commit comes last.

So an interrupted run has published nothing, and the next one finds the large files there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants

from hub.assembly import Step, fetch_checked
from hub.card import PULL_REQUEST, Origin
from hub.errors import HubError, PublishError, first_line, hub_errors
from hub.planning import Publication, listing, target_of

TITLE = "Batched generate for any number of rows, on transformers 4.57 and 5.x"


@dataclass(frozen=True)
class Published:
    """What came of it.

    url: of the commit or the pull request. revision: where it is, None for main. made: False if it was there already.
    """

    url: str
    revision: str | None
    made: bool


def publish(publication: Publication, *, private: bool = False, say: Callable[[str], None] = print) -> Published:
    """Make a plan true: create the repository if there is none, send large files, and commit everything at once.

    Args:
        publication: the plan.
        private: make a new repository private.
        say: told what is not as planned.

    Returns:
        Where it is.

    Raises:
        PublishError: the hub refuses or cannot be reached. No revision has changed; the next run goes on.
    """
    api, repo = HfApi(), publication.repo
    with hub_errors("repo", repo):
        user = api.whoami()["name"]
    if publication.kind == PULL_REQUEST:
        return _open_pull_request(publication, user)
    if publication.head is None:
        with hub_errors("repo", repo):
            api.create_repo(repo, private=private, exist_ok=True)
        head, there = target_of(repo, publication.kind)
        publication = replace(publication, head=head, there=there)
    changes = publication.changes
    if not changes:
        return Published(f"{constants.ENDPOINT}/{repo}", None, made=False)
    try:
        commit = _commit(publication, _on_disk(publication, changes))
    except _CannotCopy as error:
        say(f"The hub does not copy the weights ({error}); they are downloaded and uploaded instead.")
        changes = [replace(step, action="upload") if step.action == "copy" else step for step in changes]
        commit = _commit(publication, _on_disk(publication, changes))
    return Published(str(commit.commit_url), None, made=True)


class _CannotCopy(HubError):
    """The hub does not copy large files between these repositories."""


def _open_pull_request(publication: Publication, user: str) -> Published:
    """Open it, or bring up to date the one that this user opened before."""
    api, repo = HfApi(), publication.repo
    if not publication.changes:
        raise PublishError(f"repo: {repo} holds this code already, so there is nothing to ask for")
    with hub_errors("repo", repo):
        mine = api.get_repo_discussions(repo, author=user, discussion_type="pull_request", discussion_status="open")
        found = next((pull for pull in mine if pull.title == TITLE), None)
        if found is not None:
            revision = f"refs/pr/{found.num}"
            head, there = listing(repo, revision)
            publication = replace(publication, head=head, there=there)
            if publication.changes:
                _commit(publication, publication.changes, revision=revision)
            return Published(f"{constants.ENDPOINT}/{repo}/discussions/{found.num}", revision, made=False)
        commit = _commit(publication, publication.changes, create_pr=True)
    return Published(str(commit.pr_url), str(commit.pr_revision), made=True)


def _commit(
    publication: Publication, changes: Iterable[Step], *, revision: str | None = None, create_pr: bool = False
) -> Any:
    operations = [_operation(step, publication.origin) for step in changes]
    with hub_errors("repo", publication.repo):
        try:
            return HfApi().create_commit(
                publication.repo,
                operations,
                commit_message=TITLE,
                commit_description=publication.description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=publication.head,
            )
        except Exception as error:
            if _is_about_copying(error):
                raise _CannotCopy(first_line(error)) from error
            raise


def _operation(step: Step, origin: Origin) -> Any:
    if step.action == "delete":
        return CommitOperationDelete(step.name)
    if step.action == "copy":
        return CommitOperationCopy(
            step.name, step.name, src_revision=origin.commit, src_repo_id=origin.name, src_repo_type="model"
        )
    return CommitOperationAdd(step.name, step.content if step.content is not None else str(step.source))


def _on_disk(publication: Publication, changes: list[Step]) -> list[Step]:
    """The changes, what is to be uploaded being on this machine."""
    missing = {step.name for step in changes if step.action == "upload" and step.source is None}
    if not missing:
        return changes
    folder = fetch_checked(publication.origin.name, publication.origin.commit)
    return [replace(step, source=folder / step.name) if step.name in missing else step for step in changes]


def _is_about_copying(error: Exception) -> bool:
    response = getattr(error, "response", None)
    url = str(getattr(getattr(response, "request", None), "url", ""))
    return type(error).__name__ == "FileDuplicationError" or "/lfs-files/duplicate" in url or "xet hash" in str(error)
