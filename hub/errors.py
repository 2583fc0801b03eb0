# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What goes wrong with a base, a folder or the hub, as one line that names the argument and never holds a token."""

import contextlib
import json
import re
from collections.abc import Iterator

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Whose errors are the hub's; the client's own and those of its transports share no base class
_CLIENT = {"huggingface_hub", "requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2"}
# Nor do the transports', but these names
_NETWORK = {"ConnectionError", "ConnectError", "Timeout", "TimeoutException", "NetworkError", "RemoteProtocolError"}
_LOGIN = "set HF_TOKEN or run `hf auth login`"


class HubError(ValueError):
    """Something that the user can put right; the message is one line."""


class AssemblyError(HubError):
    """The base or the target folder cannot be used; the message names the argument, what came, what was expected."""


class PublishError(HubError):
    """The hub or a repository on it cannot be used; the message names the argument, what came, what was expected."""


def redacted(text: str) -> str:
    """A text without tokens: the one in use, and whatever looks like one."""
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(r"\b(?:hf|api_org)_\w{8,}", "***", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name when it has none, without tokens."""
    return redacted(next(iter(str(error).strip().splitlines()), type(error).__name__))


@contextlib.contextmanager
def hub_errors(argument: str, repo: str, revision: str | None = None, *, at_commit: bool = False) -> Iterator[None]:
    """Turn the hub client's errors, the network's and the disk's into one line each; any other is a bug, and stays.

    Args:
        argument: "base" for what is read, "repo" for what is written.
        repo: its value.
        revision: the revision that is asked for.
        at_commit: an answer that does not come may be one to a commit that was made.

    Raises:
        AssemblyError: with the argument "base".
        PublishError: with any other.
    """
    _check_token()
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        if not any(map(_is_the_hubs, _chain(error))):
            raise
        kind = AssemblyError if argument == "base" else PublishError
        raise kind(_explained(error, argument, repo, revision, at_commit)) from error


def is_missing(error: BaseException) -> bool:
    """Whether the hub's client says that there is no such repository, or none that this user may see."""
    # The client knows the 401 of a request without token for what it is at https endpoints only
    chain = _chain(error)
    unseen = any(isinstance(link, RepositoryNotFoundError) or _status(link) == 401 for link in chain)
    return unseen and not _is_unknown_token(error) and not any(isinstance(link, GatedRepoError) for link in chain)


def _is_the_hubs(error: BaseException) -> bool:
    """Whether the hub's client, its transport or the disk raised an error. A proxy's HTML answers are no JSON."""
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | json.JSONDecodeError) or not modules.isdisjoint(_CLIENT)


def _check_token() -> None:
    # The client puts it into a header, whose error message would be about a codec
    if not (get_token() or "").isascii():
        raise PublishError(f"token: it holds other characters than a token does; {_LOGIN}")


def _explained(error: Exception, argument: str, repo: str, revision: str | None, at_commit: bool) -> str:
    chain = _chain(error)
    status = next((status for status in map(_status, chain) if status is not None), None)

    def is_any(*kinds: type) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    reason = redacted(next((message for message in map(_server_message, chain) if message), ""))
    again = "run the command again to go on"
    if at_commit:
        again = "the commit may have been made: run the command again, it will tell"
    folder_or_not = f"{repo} is no folder, and the hub" if argument == "base" else f"{repo}: the hub"
    if is_any(LocalTokenNotFoundError):
        return f"token: none was found; {_LOGIN}"
    if _is_unknown_token(error):
        expired = any("expired" in _server_message(link) for link in chain)
        return f"token: {'it has expired' if expired else 'the hub does not know it'} (HTTP 401); {_LOGIN}"
    if is_any(GatedRepoError):
        return f"{argument}: {repo} is gated; accept its terms on its page, then {_LOGIN}"
    if is_missing(error) or is_any(HFValidationError):
        what = "neither a folder nor a hub repository" if argument == "base" else "no hub repository"
        return f"{argument}: {repo} is {what} you can read"
    if is_any(RevisionNotFoundError):
        return f"revision: {repo} has none named {revision!r}"
    if is_any(OfflineModeIsEnabled):
        return f"{argument}: {folder_or_not} is switched off by HF_HUB_OFFLINE"
    if status == 403:
        return f"{argument}: {repo} refuses this token: {reason or 'HTTP 403'}"
    if status in (409, 412):
        return f"{argument}: {repo} was changed by somebody else meanwhile; run the command again"
    if status is not None and status >= 500:
        return f"{argument}: {folder_or_not} failed (HTTP {status}); {again}"
    if any(_NETWORK & {kind.__name__ for kind in type(link).__mro__} for link in chain):
        cause = first_line(chain[-1])
        broken = f"{argument}: {folder_or_not} at {constants.ENDPOINT} cannot be reached or broke off: {cause}".rstrip(
            "."
        )
        return f"{broken}; {again}" if at_commit else broken
    if any(isinstance(link, json.JSONDecodeError) for link in chain):
        return (
            f"{argument}: {folder_or_not} at {constants.ENDPOINT} answered something else than a hub does; is it one?"
        )
    if status is not None and reason:
        return f"{argument}: {folder_or_not} refuses (HTTP {status}): {reason}"
    return f"{argument}: {folder_or_not} did not give it: {first_line(error)}"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it came from, the first cause last."""
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in found:
        found.append(link)
        link = link.__cause__ or link.__context__
    return found


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_unknown_token(error: BaseException) -> bool:
    said = [_server_message(link) for link in _chain(error) if _status(link) == 401]
    return any(word in message for message in said for word in ("credentials", "expired"))


def _server_message(error: BaseException) -> str:
    """The hub's reason for an answer, on one line."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    said = headers.get("X-Error-Message") or getattr(error, "server_message", None) or ""
    return " ".join(str(said).split())
