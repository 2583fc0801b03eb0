# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""A plan -> a commit on the hub. Large files go up first, where no revision shows them, and the commit comes last.

So an interrupted run has published nothing, and the next one finds the large files there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    DiscussionComment,
    HfApi,
    constants,
)

from hub.assembly import Step, fetch_snapshot
from hub.card import PULL_REQUEST, Origin
from hub.errors import HubError, PublishError, first_line, hub_errors
from hub.planning import Publication, listing, target_of

PUBLISHED, UPDATED, UNCHANGED = "Published", "Updated", "Already there, and up to date:"
TITLE = "Batched generate for any number of rows, on transformers 4.57 and 5.x"


@dataclass(frozen=True)
class Published:
    """What came of it.

    url: of the commit or the pull request. revision: where it is, None for main.
    outcome: PUBLISHED, UPDATED (a pull request that was open) or UNCHANGED.
    """

    url: str
    revision: str | None
    outcome: str


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
    if publication.kind == PULL_REQUEST:
        return _open_pull_request(with_open_pull(publication))
    with hub_errors("repo", repo):
        api.whoami()
    if publication.head is None:
        with hub_errors("repo", repo):
            api.create_repo(repo, private=private, exist_ok=True)
        head, there = target_of(repo, publication.kind)
        publication = replace(publication, head=head, there=there)
    changes = publication.changes
    if not changes:
        return Published(f"{constants.ENDPOINT}/{repo}", None, UNCHANGED)
    try:
        commit = _commit(publication, _on_disk(publication, changes))
    except _CannotCopy as error:
        say(f"The hub does not copy the weights ({error}); they are downloaded and uploaded instead.")
        changes = [replace(step, action="upload") if step.action == "copy" else step for step in changes]
        commit = _commit(publication, _on_disk(publication, changes))
    return Published(str(commit.commit_url), None, PUBLISHED)


class _CannotCopy(HubError):
    """The hub does not copy large files between these repositories."""


def with_open_pull(publication: Publication) -> Publication:
    """A pull request's plan, on top of the one that this user has open, if there is one.

    Args:
        publication: the plan of a new one.

    Returns:
        The plan.

    Raises:
        PublishError: there is no token, or the hub cannot be reached.
    """
    api, repo = HfApi(), publication.repo
    with hub_errors("repo", repo):
        user = api.whoami()["name"]
        mine = api.get_repo_discussions(repo, author=user, discussion_type="pull_request", discussion_status="open")
        found = next((pull.num for pull in mine if pull.title == TITLE), None)
        if found is None:
            return publication
        head, there = listing(repo, f"refs/pr/{found}")
    return replace(publication, head=head, there=there, pull=found)


def _open_pull_request(publication: Publication) -> Published:
    """Open it, or bring the one that is open up to date."""
    repo, number = publication.repo, publication.pull
    if number is not None:
        revision, outcome = f"refs/pr/{number}", UNCHANGED
        if publication.changes:
            _commit(publication, publication.changes, revision=revision)
            outcome = UPDATED
        if _describe(publication, number):
            outcome = UPDATED
        return Published(f"{constants.ENDPOINT}/{repo}/discussions/{number}", revision, outcome)
    if not publication.changes:
        raise PublishError(f"repo: {repo} holds this code already, so there is nothing to ask for")
    commit = _commit(publication, publication.changes, create_pr=True)
    return Published(str(commit.pr_url), str(commit.pr_revision), PUBLISHED)


def _describe(publication: Publication, number: int) -> bool:
    """Bring an open pull request's description, which is its first comment, up to date."""
    api, repo = HfApi(), publication.repo
    with hub_errors("repo", repo):
        events = api.get_discussion_details(repo, number).events
        first = next((event for event in events if isinstance(event, DiscussionComment)), None)
        if first is None or first.content.strip() == publication.description.strip():
            return False
        api.edit_discussion_comment(repo, number, first.id, publication.description)
    return True


def _commit(
    publication: Publication, changes: Iterable[Step], *, revision: str | None = None, create_pr: bool = False
) -> Any:
    api, repo = HfApi(), publication.repo
    operations = [_operation(step, publication.origin) for step in changes]
    additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
    # Apart from the commit, so that what fails here is known to have published nothing
    with hub_errors("repo", repo):
        api.preupload_lfs_files(repo, additions, revision=revision, create_pr=create_pr, free_memory=False)
    with hub_errors("repo", repo, at_commit=True):
        try:
            return api.create_commit(
                repo,
                operations,
                commit_message=TITLE,
                commit_description=publication.description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=publication.head,
            )
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                "the commit may have been made. The same command tells, and goes on"
            ) from interrupt
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
    folder = fetch_snapshot(publication.origin.name, publication.origin.commit)
    return [replace(step, source=folder / step.name) if step.name in missing else step for step in changes]


def _is_about_copying(error: Exception) -> bool:
    response = getattr(error, "response", None)
    url = str(getattr(getattr(response, "request", None), "url", ""))
    return type(error).__name__ == "FileDuplicationError" or "/lfs-files/duplicate" in url or "xet hash" in str(error)
