"""README.md and docs/: their Python runs as pasted, their command lines name real options, links lead somewhere.

A block that begins with ```python is ours and is run, a page's blocks one after the other; ```py is somebody else's.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from PIL import Image

from tests.conftest import CHECKPOINTS, ROOT
from tests.test_patch import import_stand_in

PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, language: str) -> list[tuple[int, str]]:
    """(line, code) of a page's fenced blocks in a language."""
    text = text_of(page)
    found = [match for match in FENCE.finditer(text) if match[2] == language]
    return [(text.count("\n", 0, match.start(3)), match[3]) for match in found]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """What the pages take for granted: a folder made by `upload_to_hub.py --base`, pictures, requests."""
    from upload_to_hub import assemble

    place = tmp_path_factory.mktemp("docs")
    assemble(CHECKPOINTS["shapes"], place / "LocateAnything-3B-batched")
    for name, demo in {"street.jpg": "1.png", "screen.png": "2.png", "yard.jpg": "6.png"}.items():
        Image.open(ROOT / "demo" / "images" / demo).convert("RGB").save(place / name)
    (place / "demo").symlink_to(ROOT / "demo")
    requests = [{"image": "street.jpg", "query": "person</c>car"}, {"image": "yard.jpg", "query": "dog"}]
    (place / "requests.jsonl").write_text("\n".join(map(json.dumps, requests)) + "\n")
    return place


@pytest.fixture
def hub(workplace, monkeypatch):
    """The Auto classes find what the pages name on the hub: a stand-in for the stock model, and what was published."""

    def found(auto, load):
        def from_pretrained(name, *args, **kwargs):
            if name not in ("nvidia/LocateAnything-3B", "me/NAME"):
                return load(name, *args, **kwargs)
            if auto == "AutoModel" and name.startswith("nvidia/") and not {"config", "revision"} & kwargs.keys():
                return import_stand_in().from_pretrained(CHECKPOINTS["shapes"]).eval()
            kwargs.pop("revision", None)
            return load("LocateAnything-3B-batched", *args, **kwargs)

        return from_pretrained

    for auto in ("AutoConfig", "AutoModel", "AutoProcessor"):
        known = getattr(transformers, auto)
        monkeypatch.setattr(known, "from_pretrained", found(auto, known.from_pretrained))


RUN = [page for page in PAGES if blocks_of(page, "python") and page != "docs/patch.md"]  # that one in test_patch.py


@pytest.mark.parametrize("page", RUN)
def test_python_runs_as_pasted(page, workplace, hub, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(ROOT / "patch")
    namespace: dict = {"__name__": "__main__"}
    for line, code in blocks_of(page, "python"):
        exec(compile("\n" * line + code, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_name_scripts_and_options_that_exist(page):
    for _, block in blocks_of(page, "") + blocks_of(page, "bash"):
        for line in re.findall(r"^python (\w[\w/]*\.py.*)$", block, re.MULTILINE):
            script, *words = line.split("#")[0].split()
            assert (ROOT / script).is_file(), line
            options = {word.split("=")[0] for word in words if word.startswith("--")}
            assert options <= options_of(script, *[word for word in words[:1] if word.isalpha()]), line


@functools.cache
def options_of(script: str, *subcommand: str) -> set[str]:
    command = [sys.executable, str(ROOT / script), *subcommand, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z][a-z-]*", shown))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text_of(page)):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_readme_is_short_and_names_the_tested_release():
    assert text_of("README.md").count("\n") <= 150
    pinned = re.search(r'"(5\.[0-9.]+)" if', text_of("Makefile"))[1]
    assert pinned in text_of("README.md")
