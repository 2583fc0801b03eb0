# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What a repository says of itself: model cards, the pull request's description, the lines that load it."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from hub.assembly import PROJECT, is_code, is_weights
from hub.errors import AssemblyError, first_line

OWN, CODE_ONLY, PULL_REQUEST = "own", "code-only", "pull request"
# What the base's card says of the weights, and holds for them wherever they are
_KEPT = ("license", "license_name", "license_link", "language", "datasets", "tags", "pipeline_tag")
_LEGAL = {"license", "licenses", "licence", "licences", "notice", "notices", "copying", "copyright"}
# At a card's top, where the base's own card that is embedded below cannot put them
_BASE = re.compile(r"\s*<!-- base: (\S+) at (\w+)(?: for (\S+))? -->")
_DIGEST = re.compile(r"<!-- made by upload_to_hub\.py: (\w+) -->\n")


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from.

    name: hub id or folder. commit: None for a folder. revision: what was asked for. files: names and sizes.
    """

    name: str
    commit: str | None
    revision: str | None
    files: dict[str, int]
    card: str

    @property
    def metadata(self) -> dict[str, Any]:
        """The front matter of the base's card.

        Raises:
            AssemblyError: it is not YAML.
        """
        try:
            found = yaml.safe_load(_split(self.card)[0]) if self.card else None
        except yaml.YAMLError as error:
            raise AssemblyError(f"base: the front matter of README.md is not YAML ({first_line(error)})") from error
        return found if isinstance(found, dict) else {}

    @property
    def model_id(self) -> str | None:
        """What a card names as `base_model`: the hub id, or what a folder's own card names."""
        if self.commit is not None:
            return self.name
        named = self.metadata.get("base_model") or None
        return str(named[0] if isinstance(named, list) else named) if named else None

    @property
    def legal_files(self) -> list[str]:
        """The licences and notices that came with the weights."""
        return sorted(name for name in self.files if _is_legal(name))


def _is_legal(name: str) -> bool:
    """Whether a file at the top is a licence or a notice; LICENSE-CODE is this project's."""
    words = re.findall(r"[a-z]+", name.lower())
    other = "/" in name or name == "LICENSE-CODE" or is_weights(name) or is_code(name)
    return not other and not _LEGAL.isdisjoint(words)


def model_card(kind: str, repo: str, origin: Origin) -> str:
    """The README.md of a repository of one's own.

    Args:
        kind: OWN or CODE_ONLY.
        repo: the repository's hub id.
        origin: the checkpoint that it is made of.

    Returns:
        The card: metadata, how to load it, the licences; behind them the base's own card, if the weights come along.
    """
    metadata = {key: origin.metadata[key] for key in _KEPT if key in origin.metadata}
    metadata.setdefault("pipeline_tag", "image-text-to-text")
    metadata["library_name"] = "transformers"
    if origin.model_id:
        metadata["base_model"] = origin.model_id
    base = f"`{origin.model_id}`" if origin.model_id else "the base checkpoint"
    named = "the licence that the metadata above names" if "license" in metadata else "the base's licence"
    legal = ", ".join(f"`{name}`" for name in origin.legal_files) or named
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---\n"]
    if origin.commit is not None:
        asked = f" for {origin.revision}" if origin.revision else ""
        parts.append(f"<!-- base: {origin.name} at {origin.commit}{asked} -->\n")
    parts.append(f"# {repo.split('/')[-1]}\n")
    parts.append(f"{base[:1].upper()}{base[1:]} with a `generate` that takes batches. {_intro()}\n")
    parts.append("```python\nfrom transformers import AutoConfig, AutoModel, AutoProcessor\n")
    parts.append("\n".join(loading_lines(kind, repo, origin)) + "\n```\n")
    parts.append("## Licence\n")
    if kind == OWN:
        parts.append(
            f"The weights and data files are those of {base}, unchanged but for the code that the JSON files name. "
            f"They stay under their licence: {legal}. The Python files are not the base's; they are under Apache-2.0 "
            "(`LICENSE-CODE`).\n"
        )
        body = _split(origin.card)[1].strip()
        if body:
            parts.append(f"## The card of {base}\n\n{body}\n")
    else:
        parts.append(
            f"This repository holds no weights; they are loaded from {base}, under their licence. Configuration "
            f"and tokenizer are those of {base}, unchanged but for the code that the JSON files name, and under the "
            f"same licence: {legal}. The Python files are under Apache-2.0 (`LICENSE-CODE`).\n"
        )
    card = "\n".join(parts)
    return f"{card}\n<!-- made by upload_to_hub.py: {_digest(card)} -->\n"


def origin_of(card: str) -> tuple[str, str, str | None] | None:
    """The base that one of our cards names, its commit, and the revision that was asked for; None without a base."""
    found = _BASE.match(_split(card)[1])
    return (found[1], found[2], found[3]) if found else None


def is_as_made(card: str) -> bool:
    """Whether a card is one of `model_card`, and nobody has written in it since."""
    found = list(_DIGEST.finditer(card))
    return bool(found) and found[-1].end() == len(card) and found[-1][1] == _digest(card[: found[-1].start() - 1])


def _digest(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()[:16]


def loading_lines(kind: str, repo: str, origin: Origin | None = None, revision: str | None = None) -> list[str]:
    """The Python lines that load what was published.

    Args:
        kind: OWN, CODE_ONLY or PULL_REQUEST.
        repo: the repository's hub id.
        origin: what it was made of: where the weights of a CODE_ONLY repository are.
        revision: of the repository; None for main.

    Returns:
        Lines that give `model` and `processor`.
    """
    options = f"{f'revision={json.dumps(revision)}, ' if revision else ''}trust_remote_code=True"
    if kind == CODE_ONLY:
        assert origin is not None
        weights = f"revision={json.dumps(origin.revision)}, " if origin.revision else ""
        # The code is in another repository than the weights, so its revision has a name of its own
        code = f"code_revision={json.dumps(revision)}, " if revision else ""
        load = [
            f'config = AutoConfig.from_pretrained("{repo}", {options})',
            f'model = AutoModel.from_pretrained("{origin.name}", config=config, {weights}{code}'
            'trust_remote_code=True, dtype="auto")',
        ]
    else:
        load = [f'model = AutoModel.from_pretrained("{repo}", {options}, dtype="auto")']
    return [*load, f'processor = AutoProcessor.from_pretrained("{repo}", {options})']


def pull_request_description(repo: str, project: Path = PROJECT) -> str:
    """What a pull request says of itself: from the README what it does and what was run, and the measured speed.

    Args:
        repo: the repository that it goes to.
        project: where README.md and benchmarks/ are.

    Returns:
        Markdown.
    """
    readme = (project / "README.md").read_text(encoding="utf-8")
    load = "\n".join(loading_lines(PULL_REQUEST, repo, revision="refs/pr/N"))
    parts = [
        _intro(project),
        "This adds the code beside what is there and switches `auto_map` to it. Weights, tokenizer and the present "
        "code are untouched. To try it, with N the number of this pull request:",
        f"```python\n{load}\n```",
    ]
    for title in ("What it does", "Which mode", "Status"):
        text = _of_the_model(_section(readme, title))
        if text:
            parts.append(f"## {title}\n\n{text}")
    parts.append(f"## Speed\n\n{_speed(project / 'benchmarks' / 'results.jsonl')}")
    notes = _section((project / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"), "Not run")
    if notes:
        parts.append(f"Not run: {notes}")
    parts.append("The added code is Apache-2.0 (`LICENSE-CODE`); the weights' licence is not touched.")
    return "\n\n".join(parts) + "\n"


def _speed(path: Path) -> str:
    """The benchmark records as a table, the machine named once for each that was used."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    # The file also holds records of other benchmarks, and runs without the stock beside them
    records = [record for record in records if record.get("stock_speedup")]
    lines = ["| machine | workload | rows | rows/s | against the stock loop |", "|---|---|---|---|---|"]
    for record in records:
        machine = f"{record['machine']}, {record['dtype']}, transformers {record['transformers']}, {record['date']}"
        ratio = f"{record['stock_speedup']:.2f} ×"
        workload = f"{record['workload']}, {record['new_tokens']} new tokens"
        lines.append(f"| {machine} | {workload} | {record['rows']} | {record['rows_per_second']:.3f} | {ratio} |")
    return "\n".join(lines)


def _intro(project: Path = PROJECT) -> str:
    """The README's first paragraph, on one line."""
    text = (project / "README.md").read_text(encoding="utf-8")
    return " ".join(text.split("\n\n")[1].split())


def _section(text: str, title: str) -> str:
    """The text under a heading, its links within the project as plain words."""
    found = re.search(rf"^## {re.escape(title)}\n+(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", found[1].strip()) if found else ""


def _of_the_model(text: str) -> str:
    """A section without the table rows about patching and publishing, which concern this project's clones only."""
    lines = text.splitlines()
    return "\n".join(line for line in lines if not re.match(r"\|[^|]*(?:patch|publish|`repo`)", line))


def _split(card: str) -> tuple[str, str]:
    """A card's front matter and its body."""
    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|\Z)(.*)", card, re.DOTALL)
    return (found[1], found[2]) if found else ("", card)
