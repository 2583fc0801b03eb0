# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""What goes wrong with a base, a folder or the hub, as one line that never holds a token."""

import re

from huggingface_hub import constants, get_token
from huggingface_hub.errors import GatedRepoError, LocalTokenNotFoundError

# The client's transports, by release; their errors share no base class
_TRANSPORTS = {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2"}
_LOGIN = "set HF_TOKEN or run `hf auth login`"


class HubError(ValueError):
    """Something that the user can put right: a line that names the argument, what came and what was expected."""


def explain(error: BaseException) -> str | None:
    """The line that tells a user of an error: ours, the hub's, the network's, the disk's.

    Returns:
        The line, without tokens; None for any other error, which is a bug.
    """
    status = getattr(getattr(error, "response", None), "status_code", None)
    package = type(error).__module__.split(".")[0]
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, GatedRepoError):
        said = f"{said} Accept its terms on its page, then {_LOGIN}."
    elif isinstance(error, LocalTokenNotFoundError):
        said = f"token: none was found; {_LOGIN}"
    elif status == 401:
        said = f"token: none, or one that the hub does not know; {_LOGIN} ({said})"
    elif status == 412:
        said = f"the repository was changed meanwhile; run the command again ({said})"
    elif status is None and package in _TRANSPORTS:
        said = f"the hub at {constants.ENDPOINT} cannot be reached, or broke off ({said}); run the command again"
    elif package not in ("huggingface_hub", *_TRANSPORTS) and not isinstance(error, HubError | OSError):
        return None
    return redacted(said)


def redacted(text: str) -> str:
    """A text without tokens: the one in use, and whatever looks like one."""
    text = text.replace(get_token() or "\0", "***")
    return re.sub(r"\b(?:hf|api_org)_\w{8,}", "***", text)
