# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What was published, against what this code would publish: every file, and an answer about a picture.

The files are compared by the hashes that the hub lists. Then they are downloaded into an empty cache, and a process
that is offline, so that nothing but them can be loaded, answers with them and with the folder that `assemble` builds.
"""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from hub.assembly import PROJECT, Step, assemble, is_code, is_drop_in, read_json, readable_size, remote_code_files
from hub.card import CODE_ONLY, OWN, PULL_REQUEST, origin_of
from hub.errors import PublishError, hub_errors, redacted
from hub.planning import Publication, card_of, listing, oid_of, plan_pull_request, plan_repository

# Of the environment of the process that loads: tokens, and places that would be used instead of the empty cache
UNSET = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_MODULES_CACHE"),
    *("TRANSFORMERS_CACHE", "PYTORCH_TRANSFORMERS_CACHE", "PYTORCH_PRETRAINED_BERT_CACHE"),
)
PROBE = Path(__file__).with_name("probe.py")
IMAGE = PROJECT / "demo" / "images" / "065.png"
QUESTION = "Locate all the instances that matches the following description: orange square</c>yellow triangle."


@dataclass(frozen=True)
class Verdict:
    """same: whether everything agrees. lines: what was compared, for people."""

    same: bool
    lines: list[str]


def verify(
    repo: str,
    revision: str | None = None,
    base: str | None = None,
    *,
    image: Path = IMAGE,
    question: str = QUESTION,
) -> Verdict:
    """Compare a published repository or pull request with this code.

    Args:
        repo: its hub id.
        revision: branch, tag, commit or refs/pr/N.
        base: what it was made of, where its card does not say.
        image: the picture to ask about.
        question: what to ask.

    Returns:
        The verdict.

    Raises:
        PublishError: it cannot be read, or is none of ours, or does not load.
        AssemblyError: the base cannot be read.
    """
    if not image.is_file():
        raise PublishError(f"image: {image} is no file")
    expected = _expected(repo, revision, base)
    lines = [f"{repo} at {expected.head}, {expected.kind}, made of {expected.origin.name}"]
    wrong = [*expected.changes, *_surplus(expected)]
    lines += [f"{'too much' if step.action == 'delete' else 'differs'}: {step.name}" for step in wrong]
    lines += [f"not compared: {name}" for name in expected.others]
    lines.append(f"{len(expected.steps)} files compared, {len(wrong)} differ")
    if any(step.action in ("code", "edit") or is_code(step.name) for step in wrong):
        # Foreign code is not run, not even to see what it answers
        return Verdict(False, [*lines, "Its code is not this project's as it stands here, so it was not loaded."])
    with tempfile.TemporaryDirectory(prefix="locateanything-verify-") as folder:
        published, local = _answers(expected, revision, Path(folder), image, question)
    lines += [f"published: {published}", f"local:     {local}"]
    same = not wrong and published == local
    return Verdict(same, [*lines, "The same." if same else "NOT the same."])


def print_verification(repo: str, revision: str | None = None, base: str | None = None) -> None:
    """Print what `verify` would download and compare."""
    expected = _expected(repo, revision, base)
    for step in expected.steps:
        print(f"compare {readable_size(step.size):>10}  {step.name}")
    for name, files in _downloads(expected).items():
        size = sum(files.values())
        where = (revision or "main") if name == repo else expected.origin.commit
        print(f"download {readable_size(size)} ({len(files)} files) of {name} at {where} to an empty cache")
    print(
        "Then load it offline and compare an answer. Only configs and tokenizer were downloaded, to the hub's cache."
    )


def _expected(repo: str, revision: str | None, base: str | None) -> Publication:
    """What should be there, beside what is there."""
    with hub_errors("repo", repo, revision):
        head, there = listing(repo, revision)
    if (revision or "").startswith("refs/pr/"):
        plan = plan_pull_request(repo)
        planned = {step.name for step in plan.steps}
        # What it leaves alone is what main holds
        left = {name: file for name, file in plan.there.items() if name not in planned}
        steps = [*plan.steps, *(Step("keep", name, file.size) for name, file in left.items())]
        oids = {name: oid_of(file) for name, file in left.items()}
        return replace(plan, steps=steps, oids=oids, head=head, there=there)
    if "config.json" not in there:
        raise PublishError(f"repo: {repo} at {revision or 'main'} holds no config.json, so it was not published whole")
    with hub_errors("repo", repo, revision):
        config = read_json(Path(hf_hub_download(repo, "config.json", revision=head)))
    if not is_drop_in(config):
        raise PublishError(
            f"repo: {repo} at {revision or 'main'} is none of this project's: config.json names other code"
        )
    kind = CODE_ONLY if "--" in str(config["auto_map"]) else OWN
    named = origin_of(card_of(repo, head)) if "README.md" in there else None
    if base is None and named is None:
        raise PublishError(f"base: the card of {repo} names none, so --base must say what it was made of")
    if base is not None:
        plan = plan_repository(base, repo, kind=kind)
    else:
        name, commit, asked = named  # type: ignore[misc]
        plan = plan_repository(name, repo, asked, kind=kind, commit=commit)
    return replace(plan, head=head, there=there)


def _surplus(expected: Publication) -> list[Step]:
    """What a pull request holds beyond main and this code."""
    if expected.kind != PULL_REQUEST:
        return []
    names = sorted(set(expected.there) - {step.name for step in expected.steps})
    return [Step("delete", name, expected.there[name].size) for name in names]


def _downloads(expected: Publication) -> dict[str, dict[str, int]]:
    """Files and sizes by repository: what is published but for others' code; the weights, where they are elsewhere."""
    ours = {path.name for path in remote_code_files()}
    files = {name: file.size for name, file in expected.there.items() if not name.endswith(".py") or name in ours}
    downloads = {expected.repo: files}
    if expected.kind == CODE_ONLY:
        base = expected.origin.files
        downloads[expected.origin.name] = {name: size for name, size in base.items() if not name.endswith(".py")}
    return downloads


def reason_of(stderr: str) -> str:
    """The line of a process's errors that says why it ended: the last one that names an error, or the last."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(?:Error|Exception|Exit|Interrupt)\b", line)]
    return (named or lines or ["no message"])[-1].strip()


def _answers(expected: Publication, revision: str | None, folder: Path, image: Path, question: str) -> tuple[Any, Any]:
    """The published model's answer and the local one's, both out of an empty cache."""
    cache = folder / "hub"
    snapshots = {}
    for name, files in _downloads(expected).items():
        wanted = revision if name == expected.repo else expected.origin.commit
        with hub_errors("repo", name, wanted):
            snapshots[name] = snapshot_download(name, revision=wanted, cache_dir=cache, allow_patterns=list(files))
    # That there is none must be in the cache too; transformers 4.57 looks for it on main, and reads it at the revision
    for name, wanted in itertools.product(("processor_config.json", "preprocessor_config.json"), (None, revision)):
        with hub_errors("repo", expected.repo), contextlib.suppress(EntryNotFoundError):
            hf_hub_download(expected.repo, name, revision=wanted, cache_dir=cache)
    whole = snapshots[expected.origin.name if expected.kind == CODE_ONLY else expected.repo]
    local = assemble(whole, folder / "local")
    asked = {
        "repo": expected.repo,
        "revision": revision,
        "base": expected.origin.name if expected.kind == CODE_ONLY else None,
        "base_revision": expected.origin.commit,
        "local": str(local),
        "image": str(image.resolve()),
        "question": question,
    }
    # Offline and without a token: what is not in the cache cannot be loaded
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    environment.update(HF_HOME=str(folder), HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE="1")
    # By its text, so that no folder of this project is on the path
    done = subprocess.run(
        [sys.executable, "-c", PROBE.read_text(encoding="utf-8"), json.dumps(asked)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PublishError(f"repo: {expected.repo} does not load offline: {redacted(reason_of(done.stderr))}")
    answers = json.loads(done.stdout.splitlines()[-1])
    return answers["published"], answers["local"]
