# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""What a repository says of itself: model cards, the pull request's description, the lines that load it."""

import re
from pathlib import Path
from string import Template

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard, ModelCardData

from hub.assembly import Base, is_weights
from hub.errors import HubError

# In our cards, so that somebody else's is known and stays
MARK = (
    "<!-- Written by upload_to_hub.py, which replaces this file at its next run. To keep yours, delete this line. -->"
)
# What the base's card says of the weights, and holds for them wherever they are
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "tags", "pipeline_tag", "base_model")
_LEGAL = {"license", "licenses", "licence", "licences", "notice", "notices", "copying", "copyright"}
_PULL_REQUEST = Path(__file__).with_name("pull_request.md")
# What each kind of pull request changes for a caller
_TRAINING = "In training, `labels` train next tokens; the block losses of the present class are no part of it."
VARIANTS = {
    "default": "`AutoModel` loads the batched class. One row with `tokenizer=` returns its text as now, several a "
    f"list. Configuration class, processor and LoRA hooks stay as they are. {_TRAINING}",
    "opt-in": "Nothing for existing callers. `AutoModelForImageTextToText`, which names nothing here today, loads the "
    "batched class, on the configuration class and the processor that are here.",
    "processor": "`AutoModel` loads the batched class, and `AutoProcessor` a processor that needs no decord, lmdb or "
    f"cv2. One row with `tokenizer=` returns its text as now, several a list. {_TRAINING}",
}


def is_legal(name: str) -> bool:
    """Whether a file at the top is a licence or a notice; LICENSE-CODE is this project's."""
    words = re.findall(r"[a-z]+", name.lower())
    return not ("/" in name or name == "LICENSE-CODE" or is_weights(name) or _LEGAL.isdisjoint(words))


def model_card(base: Base, repo: str, revision: str | None = None, *, code_only: bool = False) -> str:
    """The README.md of a repository of one's own: metadata, how to load it, the licences, the base's own card.

    Args:
        base: the checkpoint that it is made of; `revision` as it was asked for.
        repo: the repository's hub id.
        code_only: the weights stay in the base's repository, and its card there.

    Raises:
        HubError: the base's card cannot be read.
    """
    path = base.folder / "README.md"
    try:
        theirs = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else "", ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(f"base: README.md of {base.name} is no model card ({error})") from error
    kept = {key: value for key, value in theirs.data.to_dict().items() if key in _KEPT}
    kept = {"pipeline_tag": "image-text-to-text", **kept, "library_name": "transformers"}
    if base.commit is not None:
        kept["base_model"] = base.name
    of = f"`{kept['base_model']}`" if "base_model" in kept else "the base checkpoint"
    legal = ", ".join(f"`{name}`" for name in sorted(filter(is_legal, base.sizes))) or "named above"
    lines = "\n".join(loading_lines(repo, base=base.name if code_only else None, base_revision=revision))
    where = f"loaded from {of}, under their licence" if code_only else f"those of {of}, unchanged"
    text = f"""
{MARK}
# {repo.split("/")[-1]}

{of[:1].upper()}{of[1:]} with a `generate` that takes any number of rows; each is answered as it would be alone.

```python
from transformers import AutoConfig, AutoModel, AutoProcessor

{lines}
```

## Licence

The weights are {where}. Configuration and tokenizer are those of {of}, unchanged but for the code that the JSON files
name. All of these stay under their licence: {legal}. The Python files are not the base's; they are under Apache-2.0
(`LICENSE-CODE`).
"""
    if theirs.text.strip() and not code_only:
        text += f"\n## The card of {of}\n\n{theirs.text.strip()}\n"
    return f"---\n{ModelCardData(**kept).to_yaml()}\n---\n{text}"


def loading_lines(
    repo: str,
    revision: str | None = None,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    auto: str = "AutoModel",
) -> list[str]:
    """The Python lines that load `model` and `processor`; `base` has the weights of one with the code alone."""
    options = f'revision="{revision}", trust_remote_code=True' if revision else "trust_remote_code=True"
    lines = [f'model = {auto}.from_pretrained("{repo}", {options}, dtype="auto")']
    if base is not None:
        where = f'revision="{base_revision}", ' if base_revision else ""
        lines = [
            f'config = AutoConfig.from_pretrained("{repo}", {options})',
            f'model = {auto}.from_pretrained("{base}", config=config, {where}trust_remote_code=True, dtype="auto")',
        ]
    return [*lines, f'processor = AutoProcessor.from_pretrained("{repo}", {options})']


def auto_class(variant: str) -> str:
    """The class that loads the batched model of a pull request."""
    return "AutoModelForImageTextToText" if variant == "opt-in" else "AutoModel"


def pull_request_description(repo: str, variant: str, files: int, lines: int, project_url: str | None = None) -> str:
    """pull_request.md with what differs from one to the next: how many files and lines are added, and so on."""
    text = Template(_PULL_REQUEST.read_text(encoding="utf-8")).substitute(
        changes=VARIANTS[variant],
        files=files,
        lines=f"{lines:,}",
        load="\n".join(loading_lines(repo, "refs/pr/N", auto=auto_class(variant))),
        project=f"Project: {project_url}" if project_url else "",
    )
    return text.strip() + "\n"
