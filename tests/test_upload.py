"""upload_to_hub.py against a hub on loopback: what is published, how it loads, and what a failure leaves behind."""

from __future__ import annotations

import difflib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from hub import publishing
from hub.assembly import WEIGHT_PATTERNS, Step, remote_code_files
from hub.card import (
    CODE_ONLY,
    OWN,
    PULL_REQUEST,
    Origin,
    is_as_made,
    loading_lines,
    model_card,
    origin_of,
    pull_request_description,
)
from hub.errors import AssemblyError, PublishError, hub_errors, redacted
from hub.planning import Publication, copies_across, plan_pull_request, plan_repository
from hub.publishing import TITLE
from hub.verifying import reason_of
from tests.conftest import CHECKPOINTS, GOLDENS, ROOT, cases_of
from tests.hub_server import READER, WRITER, Hub, Repo, git_oid, sha256

BASE, SHARDED = "nvidia/LocateAnything-3B", "org/sharded"
OWN_REPO, CODE_REPO = "ada/own", "ada/code"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
STOCK = tuple(f"{part}_locateanything.py" for part in ("configuration", "modeling", "processing", "image_processing"))
CARD = "---\nlicense: other\nlicense_name: nvidia\nlicense_link: LICENSE\ntags:\n- grounding\n---\n# The base's card\n"
# Runs command lines one after another: starting Python for each would be most of their time
SHELL = """
import contextlib, io, json, os, sys
sys.path.insert(0, sys.argv[1])
import upload_to_hub
for line in sys.stdin:
    asked = json.loads(line)
    os.environ["HF_TOKEN"] = asked["token"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = upload_to_hub.main(asked["arguments"])
        except SystemExit as end:
            code = end.code
    print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), flush=True)
"""


class Script:
    """upload_to_hub.py in a process of its own, with an empty home and HF_ENDPOINT naming the hub."""

    def __init__(self, endpoint: str, home: Path):
        self.home = home
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        # The Xet protocol has servers of its own; without it the client uploads by LFS
        self.environment = kept | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HOME": str(home),
            "NO_PROXY": "*",
            "OMP_NUM_THREADS": "1",  # the models are tiny, and others run beside
        }
        self.stderr = ""  # of the last command line
        self._shell = self.start("-c", SHELL, str(ROOT), stdin=subprocess.PIPE)

    def start(self, *arguments: str, token: str = WRITER, **pipes: int) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
        environment = self.environment | ({"HF_TOKEN": token} if token else {})
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.home, env=environment, text=True, encoding="utf-8", **pipes
        )

    def run(self, *arguments: str, token: str = WRITER) -> dict[str, Any]:
        """A command line's code, out and err."""
        assert self._shell.stdin is not None and self._shell.stdout is not None
        print(json.dumps({"arguments": arguments, "token": token}), file=self._shell.stdin, flush=True)
        line = self._shell.stdout.readline()
        return json.loads(line or json.dumps({"code": "crash", "err": self._shell.communicate()[1]}))

    def __call__(self, *arguments: str, token: str = WRITER, code: int = 0) -> str:
        """What a command line prints: to stdout, or the one line of its error if it is to fail."""
        done = self.run(*arguments, token=token)
        assert done["code"] == code, done
        self.stderr = done["err"]
        if code == 0:
            return done["out"]
        # Beside the client's progress bars
        errors = [line for line in done["err"].splitlines() if line.startswith("upload_to_hub.py: ")]
        assert len(errors) == 1 and "Traceback" not in done["err"], done["err"]
        assert not token or token not in done["err"] + done["out"]
        return errors[0]

    def close(self) -> None:
        self._shell.communicate()


def checkpoint() -> dict[str, bytes]:
    """A repository laid out like the official one: stock code that must not run, a licence, a notice, a card."""
    files = {path.name: path.read_bytes() for path in CHECKPOINTS["shapes"].iterdir()}
    config = json.loads(files["config.json"])
    config["vision_config"]["auto_map"] = {"AutoModel": "moonshotai/absent--modeling_moonvit.Absent"}
    files["config.json"] = json.dumps(config, indent=2).encode()
    tokenizer = json.loads(files["tokenizer_config.json"])
    tokenizer["auto_map"] = {"AutoProcessor": "processing_locateanything.LocateAnythingProcessor"}
    files["tokenizer_config.json"] = json.dumps(tokenizer, indent=2).encode()
    files |= dict.fromkeys(STOCK, b"raise SystemExit('stock code was run')\n")
    return files | {"LICENSE": b"NVIDIA's", "NOTICE": b"notice", "README.md": CARD.encode(), "assets/a.png": b"png"}


@pytest.fixture(scope="session")
def hub():
    with Hub() as hub:
        hub.add(BASE, checkpoint())
        shards = {"model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))})}
        files = {name: data for name, data in checkpoint().items() if name != "model.safetensors"}
        files |= {name: text.encode() for name, text in shards.items()}
        hub.add(SHARDED, files | {name: os.urandom(300_000) for name in SHARDS})
        yield hub


@pytest.fixture(scope="session")
def script(hub, tmp_path_factory):
    script = Script(hub.url, tmp_path_factory.mktemp("home"))
    yield script
    script.close()


@pytest.fixture(autouse=True)
def no_faults(request):
    yield
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").faults.clear()
        request.getfixturevalue("hub").copies = True


@pytest.fixture(scope="session")
def published(hub, script) -> dict[str, str]:
    """Both repositories and a pull request, and what the script said of each."""
    return {
        "own": script("repo", OWN_REPO, "--base", BASE),
        "code": script("code", CODE_REPO, "--base", BASE),
        "pr": script("pr", BASE, token=READER),
    }


def ours() -> dict[str, bytes]:
    code = {path.name: path.read_bytes() for path in remote_code_files()}
    return code | {"LICENSE-CODE": (ROOT / "LICENSE").read_bytes()}


def metadata(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def writes(hub: Hub, since: int = 0) -> list[str]:
    reading = ("GET", "HEAD", "POST /api/models/org/paths-info")
    return [r for r in hub.requests[since:] if not r.startswith(reading) and "paths-info" not in r]


def test_own_repository_is_code_and_weights_in_one_commit(hub, published):
    repo, base = hub.repos[OWN_REPO], hub.repos[BASE].files()
    assert [message[:2] for message in repo.messages] == [("main", "initial commit"), ("main", TITLE)]
    files = repo.files()
    assert set(files) == set(base) - set(STOCK) | set(ours())
    assert all(files[name] == data for name, data in ours().items())
    for name in ("model.safetensors", "LICENSE", "NOTICE", "assets/a.png", "vocab.json", "tokenizer.json"):
        assert files[name] == base[name]
    config = json.loads(files["config.json"])
    assert config["auto_map"]["AutoConfig"] == "configuration.LocateAnythingConfig"
    uploads = [r for r in hub.asked(rf"PUT /lfs/{OWN_REPO}/") if r.endswith(sha256(base["model.safetensors"]))]
    copies = hub.asked(rf"POST /api/models/{BASE}/lfs-files/duplicate")
    assert (len(uploads), len(copies)) == ((0, 1) if copies_across() else (1, 0))
    assert f'AutoModel.from_pretrained("{OWN_REPO}", trust_remote_code=True' in published["own"]


def test_cards_carry_the_weights_licence(hub, published):
    commit = hub.repos[BASE].refs["main"]
    for name in (OWN_REPO, CODE_REPO):
        card = hub.repos[name].files()["README.md"]
        expected = {"license": "other", "license_name": "nvidia", "license_link": "LICENSE", "tags": ["grounding"]}
        expected |= {"pipeline_tag": "image-text-to-text", "library_name": "transformers", "base_model": BASE}
        assert metadata(card) == expected
        assert "`LICENSE`, `NOTICE`" in card.decode()
        assert origin_of(card.decode()) == (BASE, commit, None) and is_as_made(card.decode())
        assert ("# The base's card" in card.decode()) == (name == OWN_REPO)


def test_code_only_repository_names_itself_and_holds_no_weights(hub, published):
    files = hub.repos[CODE_REPO].files()
    assert not any(Path(name).match(pattern) for name in files for pattern in WEIGHT_PATTERNS)
    assert all(files[name] == data for name, data in ours().items())
    assert set(files) & {"LICENSE", "NOTICE", "tokenizer.json", "merges.txt"} and "generation_config.json" not in files
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        assert all(value.startswith(f"{CODE_REPO}--") for value in json.loads(files[name])["auto_map"].values())
    lines = [line.strip() for line in published["code"].splitlines()]
    assert f'config = AutoConfig.from_pretrained("{CODE_REPO}", trust_remote_code=True)' in lines
    model = f'model = AutoModel.from_pretrained("{BASE}", config=config, trust_remote_code=True, dtype="auto")'
    assert model in lines


def test_pull_request_changes_code_and_auto_maps_only(hub, script, published):
    repo = hub.repos[BASE]
    before, after = repo.files(), repo.files("refs/pr/1")
    assert len(repo.pulls) == 1 and len(repo.messages) == 2
    assert set(after) == set(before) | set(ours())
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"config.json", "preprocessor_config.json", "processor_config.json"}
    for name in changed:
        old, new = json.loads(before[name]), json.loads(after[name])
        assert old.pop("auto_map") != new.pop("auto_map") and old == new
        lines = difflib.unified_diff(before[name].decode().split("\n"), after[name].decode().split("\n"), n=0)
        assert all("_locateanything" in line or '": "' in line for line in list(lines)[2:] if line[0] in "+-")
    ref, title, description = repo.messages[1]
    assert (ref, title) == ("refs/pr/1", TITLE)
    intro = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")[1].split("\n")[0]
    record = json.loads((ROOT / "benchmarks" / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert "network of a million parameters" in description and "`patch.apply()` on the real" not in description
    for part in (
        intro,
        "## What it does",
        "## Which mode",
        "refs/pr/N",
        f"{record['stock_speedup']:.2f} ×",
        record["machine"],
    ):
        assert part in description
    assert f"{hub.url}/{BASE}/discussions/1" in published["pr"]
    assert f'AutoModel.from_pretrained("{BASE}", revision="refs/pr/1", trust_remote_code=True' in published["pr"]

    # Again: nothing new; and what went stale is brought up to date where it is
    assert "Already there" in script("pr", BASE, token=READER)
    assert len(repo.messages) == 2
    repo.commit("refs/pr/1", {**after, "vision.py": b"stale"})
    comment = repo.pulls[0]["events"][0]["data"]
    comment["latest"]["raw"] = "stale"
    assert "refs/pr/1, which is open" in script("pr", BASE, "--dry-run", token=READER)
    said = script("pr", BASE, token=READER)
    assert said.startswith(f"Updated {hub.url}") and "refs/pr/1" in said
    assert len(repo.pulls) == 1 and repo.files("refs/pr/1") == after
    assert comment["latest"]["raw"] == description


def test_published_again_changes_nothing_and_stale_code_goes(hub, script, published):
    repo = hub.repos[OWN_REPO]
    assert "Already there" in script("repo", OWN_REPO, "--base", BASE)
    assert len(repo.messages) == 2
    whole = repo.files()
    gone = ["retired.py", "custom_generate/generate.py", *SHARDS, "model.safetensors.index.json", "chat_template.json"]
    changed = {"vision.py": b"stale", "mine.txt": b"kept", "README.md": whole["README.md"] + b"My notes.\n"}
    repo.commit("main", {**whole, **dict.fromkeys(gone, b"old"), **changed})
    expected = [f"deletes {name}, which" for name in gone]
    expected += ["leaves mine.txt, which", "replaces README.md, which was written or edited"]
    for said in (script("repo", OWN_REPO, "--base", BASE, "--dry-run"), script("repo", OWN_REPO, "--base", BASE)):
        assert all(part in said for part in expected), said
    assert repo.files() == {**whole, "mine.txt": b"kept"}
    assert "leaves mine.txt" in script("repo", OWN_REPO, "--base", BASE)
    repo.commit("main", whole)


def listed(**files: bytes) -> dict[str, Any]:
    return {name: SimpleNamespace(size=len(data), blob_id=git_oid(data), lfs=None) for name, data in files.items()}


def test_what_the_former_base_brought_goes_with_it():
    there = listed(kept=b"base", gone=b"base", edited=b"mine", added=b"mine")
    steps = [Step("upload", "kept", 4, content=b"base")]
    former = dict.fromkeys(("kept", "gone", "edited"), git_oid(b"base"))
    plan = Publication(OWN, "a/b", Origin(BASE, "c0ffee", None, {}, ""), steps, {}, "head", there, "", former)
    assert [(step.action, step.name) for step in plan.changes] == [("delete", "gone")]
    assert plan.others == ["added", "edited"]
    assert replace(plan, kind=PULL_REQUEST).changes == replace(plan, kind=PULL_REQUEST).others == []


LOADER = """
import json, sys
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor
own, code, base, cases, images = json.loads(sys.stdin.read())
answers = {}
def ask(name, model, processor):
    chats = [[{"role": "user", "content": [
        {"type": "image", "image": Image.open(f"{images}/{case['images'][0]}")},
        {"type": "text", "text": case["question"]}]}] for case in cases]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, padding=True, return_dict=True, return_tensors="pt")
    width = inputs["input_ids"].shape[1]
    output = model.eval().generate(**inputs)[:, width:].tolist()
    answers[name] = [row[: len(case["output_ids"])] for row, case in zip(output, cases)]
    answers[name + " class"] = type(model).__name__
def lines(text):
    scope = dict(AutoConfig=AutoConfig, AutoModel=AutoModel, AutoProcessor=AutoProcessor)
    exec(text, scope)
    return scope["model"], scope["processor"]
for name, text in (("own", own), ("code", code), ("pr", base)):
    ask(name, *lines(text))
print(json.dumps(answers))
"""


def test_what_was_published_loads_as_printed_and_answers_the_goldens(hub, script, published):
    cases = [
        case
        for case in cases_of("shapes")
        if case["generation_mode"] == "hybrid" and case["layout"] == "image-question" and "seed" not in case
        if case["max_new_tokens"] == 256 and "repetition_penalty" not in case and case["num_tokens"] < 100
    ][:8]
    printed = [
        "\n".join(line.strip() for line in published[name].splitlines() if "from_pretrained" in line)
        for name in ("own", "code", "pr")
    ]
    since = len(hub.requests)
    loader = script.start("-c", LOADER, token="", stdin=subprocess.PIPE)
    out, err = loader.communicate(json.dumps([*printed, cases, str(GOLDENS / "shapes" / "images")]))
    assert loader.returncode == 0, err
    answers = json.loads(out.splitlines()[-1])
    for name in ("own", "code", "pr"):
        assert answers[name] == [case["output_ids"] for case in cases]
        assert answers[f"{name} class"] == "LocateAnythingBatchedForConditionalGeneration"
    assert not [r for r in hub.requests[since:] if any(name in r for name in (*STOCK, "moonshotai"))]


def test_verify_compares_files_and_answers(hub, script, published):
    said = script("verify", BASE, "--revision", "refs/pr/1", token=READER)
    answers = [line.split(":", 1)[1].strip() for line in said.splitlines() if line.startswith(("published", "local"))]
    assert len(answers) == 2 and answers[0] == answers[1] and "<box><750>" in answers[0]
    assert said.endswith("The same.\n")


def test_verify_of_a_repository_of_its_own(hub, script, published):
    assert script("verify", OWN_REPO).endswith("The same.\n")
    script("repo", "ada/broken", "--base", SHARDED)  # whose shards are random bytes
    assert "repo: ada/broken does not load offline: " in script("verify", "ada/broken", code=1)


def test_verify_does_not_run_what_differs(hub, script, published):
    for name in (OWN_REPO, CODE_REPO):
        assert "compare" in script("verify", name, "--dry-run")
    files = hub.repos[OWN_REPO].files()
    odd = {
        "vision.py": b"raise SystemExit",
        "custom_generate/generate.py": b"",
        "old.safetensors": b"",
        "mine.txt": b"",
    }
    hub.repos[OWN_REPO].commit("main", {**files, **odd})
    done = script.run("verify", OWN_REPO)
    hub.repos[OWN_REPO].commit("main", files)
    named = ["differs: vision.py", "too much: custom_generate/generate.py", "too much: old.safetensors"]
    assert done["code"] == 1
    assert all(part in done["out"] for part in [*named, "not compared: mine.txt", "not loaded"]), done
    hub.add("ada/half", {"README.md": b"claims nothing"})
    assert "not published whole" in script("verify", "ada/half", code=1)
    assert "none of this project's" in script("verify", BASE, code=1)


def test_verify_compares_what_a_pull_request_leaves_alone_with_main(hub, script, published):
    repo = hub.repos[BASE]
    files = repo.files("refs/pr/1")
    odd = {"model.safetensors": b"others", "LICENSE": b"mine", "odd.txt": b"", "x.py": b""}
    repo.commit("refs/pr/1", {name: data for name, data in (files | odd).items() if name != "NOTICE"})
    done = script.run("verify", BASE, "--revision", "refs/pr/1")
    repo.commit("refs/pr/1", files)
    named = [f"differs: {name}" for name in ("model.safetensors", "LICENSE", "NOTICE")]
    assert done["code"] == 1
    assert all(part in done["out"] for part in [*named, "too much: odd.txt", "too much: x.py", "not loaded"]), done


def test_code_for_a_revision_names_it(hub, script):
    commit = hub.repos[BASE].refs["main"]
    said = script("code", "ada/pinned", "--base", BASE, "--revision", commit)
    line = f'from_pretrained("{BASE}", config=config, revision="{commit}", trust_remote_code=True, dtype="auto")'
    repo = hub.repos["ada/pinned"]
    card = repo.files()["README.md"].decode()
    assert line in said and line in card and origin_of(card) == (BASE, commit, commit)
    repo.commit("main", {**repo.files(), "odd.py": b""})
    assert "README.md" not in script.run("verify", "ada/pinned")["out"]


def test_folders_with_the_names_of_hub_ids_are_not_looked_at(hub, script, published):
    folders = [script.home / name for name in (BASE, OWN_REPO)]
    for folder in folders:
        folder.mkdir(parents=True)
    try:
        assert "open" in script("pr", BASE, "--dry-run", token=READER)
        assert "Already there" in script("code", CODE_REPO, "--base", BASE)
        assert "compare" in script("verify", OWN_REPO, "--dry-run")
    finally:
        for folder in folders:
            folder.rmdir()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("repo", "ada/dry", "--base", SHARDED), ["create public repository ada/dry", SHARDS[0], "300.0 kB", "main"]),
        (("repo", "ada/dry", "--base", BASE, "--private"), ["create private", "model.safetensors", "4.7 MB"]),
        (("code", "ada/dry", "--base", BASE), ["edit", "config.json", "card", "ada/dry"]),
        (("pr", SHARDED), ["a new pull request", "without a token", "processing.py", "kB", SHARDED]),
    ],
)
def test_dry_run_prints_and_writes_nothing(hub, script, arguments, named):
    since = len(hub.requests)
    said = script(*arguments, "--dry-run", token="")
    assert all(part in said for part in named), said
    assert said.endswith("Nothing was published.\n")
    assert writes(hub, since) == [] and "ada/dry" not in hub.repos
    assert not any(r.endswith(name) for r in hub.requests[since:] for name in (*SHARDS, "model.safetensors"))


def empty(hub: Hub, name: str) -> bool:
    """Whether nothing that claims to be a model is in a repository."""
    return name not in hub.repos or set(hub.repos[name].files()) == {".gitattributes"}


def test_killed_upload_leaves_nothing_and_goes_on(hub, script):
    """Killed while the second shard is on its way: the repository stays empty, and the first is not sent again."""
    reached, release = threading.Event(), threading.Event()
    second = sha256(hub.repos[SHARDED].files()[SHARDS[1]])

    def hold() -> None:
        reached.set()
        release.wait(30)

    hub.fail("PUT", rf"/lfs/ada/killed/{second}", hold)
    command = ("repo", "ada/killed", "--base", SHARDED, "--upload")
    running = script.start(str(ROOT / "upload_to_hub.py"), *command)
    try:
        assert reached.wait(30)
        first = sha256(hub.repos[SHARDED].files()[SHARDS[0]])
        for _ in range(300):
            if first in hub.repos["ada/killed"].stored:
                break
            time.sleep(0.1)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
        release.set()
    assert empty(hub, "ada/killed")
    since = len(hub.requests)
    script(*command)
    assert hub.repos["ada/killed"].files()[SHARDS[1]] == hub.repos[SHARDED].files()[SHARDS[1]]
    sent = [r for r in hub.requests[since:] if r.startswith("PUT")]
    assert any(second in r for r in sent) and not any(first in r for r in sent)


def test_cut_connection_is_tried_again(hub, script):
    hub.fail("PUT", rf"/lfs/ada/cut/{sha256(hub.repos[SHARDED].files()[SHARDS[0]])}", "cut")
    said = script("repo", "ada/cut", "--base", SHARDED, "--upload")
    assert "Published" in said and hub.repos["ada/cut"].files()[SHARDS[0]]
    assert "safetensors: 100%" in script.stderr  # the progress bar


@pytest.mark.parametrize(
    ("pattern", "action", "message"),
    [
        (r"/commit/", 500, "HTTP 500"),
        (r"/commit/", 412, "changed by somebody else"),
        (r"/commit/", "cut", "the commit may have been made: run the command again"),
        (r"/preupload/", 403, "refuses this token: broken"),
    ],
)
def test_failure_leaves_nothing_and_the_next_run_goes_on(hub, script, pattern, action, message):
    name = f"ada/failed-{action}"
    hub.fail("POST", rf"/api/models/{name}{pattern}", action)
    assert message in script("repo", name, "--base", SHARDED, code=1)
    assert empty(hub, name)
    stored = set(hub.repos[name].stored)
    since = len(hub.requests)
    assert "Published" in script("repo", name, "--base", SHARDED)
    assert set(hub.repos[name].files()) >= {*SHARDS, "config.json", "processing.py"}
    assert not [r for r in hub.requests[since:] if r.startswith("PUT") and r.rsplit("/", 1)[-1] in stored]


def test_hub_that_does_not_copy_gets_an_upload(hub, script):
    hub.copies = False
    said = script("repo", "ada/fallback", "--base", SHARDED)
    assert ("does not copy the weights" in said) == copies_across()
    assert hub.repos["ada/fallback"].files()[SHARDS[0]] == hub.repos[SHARDED].files()[SHARDS[0]]
    assert len(hub.repos["ada/fallback"].messages) == 2


def test_folder_as_base_private_repository(hub, script):
    said = script("repo", "ada/folder", "--base", str(CHECKPOINTS["shapes"]), "--private")
    assert f"verify ada/folder --base {CHECKPOINTS['shapes']}" in said
    repo = hub.repos["ada/folder"]
    assert not any(
        str(CHECKPOINTS["shapes"]) in text for text in (*repo.messages[-1], repo.files()["README.md"].decode())
    )
    assert repo.private and repo.files()["model.safetensors"] == hub.repos[BASE].files()["model.safetensors"]
    assert "license" not in metadata(repo.files()["README.md"])
    assert "names none" in script("verify", "ada/folder", code=1)
    assert "compare" in script("verify", "ada/folder", "--base", str(CHECKPOINTS["shapes"]), "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (("repo", "ada/x", "--base", BASE), "hf_unknownunknownunknown", "token: the hub does not know it"),
        (("pr", BASE), "hf_unknownunknownunknown", "token: the hub does not know it"),
        (("repo", "ada/x", "--base", BASE), "", "token: none was found; set HF_TOKEN"),
        (("repo", "ada/x", "--base", BASE), READER, "repo: ada/x refuses this token: You don't have the rights"),
        (("repo", "eve/x", "--base", BASE), WRITER, "repo: eve/x refuses this token"),
        (("pr", "nobody/nothing"), WRITER, "repo: nobody/nothing is no hub repository you can read"),
        (("pr", "nothing"), WRITER, "repo: got 'nothing', expected USER/NAME"),
        (("pr", "ada/a b"), WRITER, "repo: got 'ada/a b', expected USER/NAME"),
        (("repo", "ada/x--y", "--base", BASE), WRITER, "repo: got 'ada/x--y', expected USER/NAME"),
        (("pr", "ada/weightless"), WRITER, "repo: ada/weightless lacks weights"),
        (("pr", "ada/generates"), WRITER, "repo: ada/generates holds custom_generate/generate.py"),
        (("repo", "ada/weights", "--base", BASE, "--private"), WRITER, "private: ada/weights is there and public"),
        (("publish", "ada/x"), WRITER, "command: got 'publish', expected one of assemble, repo, code, pr, verify"),
        (("repo", "ada/x", "--base", ""), WRITER, "base: got an empty text"),
        (("verify", "ada/x", "--revision", ""), WRITER, "revision: got an empty text"),
        (("pr", OWN_REPO), WRITER, f"repo: {OWN_REPO} holds this code already"),
        (("pr", BASE), "hf_töken", "token: it holds other characters than a token does"),
        (("verify", "nobody/nothing"), "", "repo: nobody/nothing is no hub repository"),
        (("repo", "ada/x", "--base", "nobody/nothing"), WRITER, "base: nobody/nothing is neither a folder nor"),
        (("repo", "ada/x", "--base", "no such base"), WRITER, "base: no such base is neither a folder nor"),
        (("repo", "ada/x", "--base", "org/gated"), WRITER, "base: org/gated is gated; accept its terms"),
        (("pr", "org/gated"), WRITER, "repo: org/gated is gated; accept its terms"),
        (("repo", "ada/x", "--base", BASE, "--revision", "v9"), WRITER, f"revision: {BASE} has none named 'v9'"),
        (("repo", BASE, "--base", BASE), WRITER, "is the base itself; open a pull request"),
        (("repo", "ada/bert", "--base", BASE), WRITER, "holds a model of type 'bert'"),
        (("code", "ada/notes", "--base", BASE), WRITER, "repo: ada/notes holds other files (notes.txt)"),
        (("code", "ada/weights", "--base", BASE), WRITER, "repo: ada/weights holds weights (model.safetensors)"),
        (("code", "ada/x", "--base", str(CHECKPOINTS["shapes"])), WRITER, "expected the hub id"),
        (("pr", "ada/bert"), WRITER, "repo: ada/bert lacks preprocessor_config.json"),
        (("--base", "org/gated", "--local-dir", "built"), WRITER, "base: org/gated is gated"),
        (("verify", BASE, "--image", "absent.png"), WRITER, "image: absent.png is no file"),
    ],
)
def test_refusals_are_one_line(hub, script, published, arguments, token, message):
    if "org/gated" not in hub.repos:
        hub.add("org/gated", checkpoint(), gated=True)
        hub.add("ada/bert", {"config.json": b'{"model_type": "bert"}'})
        weightless = {name: data for name, data in checkpoint().items() if name != "model.safetensors"}
        hub.add("ada/weightless", weightless)
        hub.add("ada/generates", {**checkpoint(), "custom_generate/generate.py": b""})
        hub.add("ada/notes", {"notes.txt": b"mine"})
        hub.add("ada/weights", {"config.json": b'{"model_type": "locateanything"}', "model.safetensors": b"w"})
    state = {name: dict(repo.refs) for name, repo in hub.repos.items()}
    assert message in script(*arguments, token=token, code=1)
    assert {name: dict(repo.refs) for name, repo in hub.repos.items()} == state


def test_no_network_is_one_line(tmp_path):
    with Hub() as gone:
        endpoint = gone.url
    script = Script(endpoint, tmp_path)
    for arguments in (("repo", "ada/x", "--base", BASE), ("pr", BASE), ("verify", BASE)):
        assert f"at {endpoint} cannot be reached" in script(*arguments, code=1)
    script.close()


def test_cut_while_reading_is_one_line(hub, script):
    hub.fail("GET", rf"/api/models/{BASE}", "cut", times=9)
    assert "cannot be reached or broke off" in script("pr", BASE, "--dry-run", code=1)


def test_help_shows_examples(script):
    for command in ((), ("assemble",), ("repo",), ("code",), ("pr",), ("verify",)):
        said = script(*command, "--help")
        assert "examples:\n  python upload_to_hub.py" in said
        assert ("--dry-run" in said) and "--token" not in said


def test_interruption_says_so(monkeypatch, capsys):
    import upload_to_hub

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(upload_to_hub, "plan_pull_request", interrupt)
    assert upload_to_hub.main(["pr", BASE]) == 130
    assert (
        capsys.readouterr().err == "upload_to_hub.py: interrupted; nothing was published. The same command goes on.\n"
    )


def test_interruption_while_the_commit_is_sent_does_not_say_nothing(monkeypatch, capsys):
    import upload_to_hub

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    plan = Publication(OWN, "a/b", Origin(BASE, "c0ffee", None, {}, ""), [], {}, "head", {}, "")
    monkeypatch.setattr(HfApi, "preupload_lfs_files", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(HfApi, "create_commit", interrupt)
    monkeypatch.setattr(upload_to_hub, "plan_pull_request", lambda _repo: publishing._commit(plan, []))
    assert upload_to_hub.main(["pr", BASE]) == 130
    assert "the commit may have been made. The same command tells" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        (401, 'User Access Token "x" is expired', "token: it has expired (HTTP 401); set HF_TOKEN"),
        (
            400,
            '"license" must be one of\n[mit]',
            'repo: a/b: the hub refuses (HTTP 400): "license" must be one of [mit]',
        ),
        (429, "Slow down", "repo: a/b: the hub refuses (HTTP 429): Slow down"),
    ],
)
def test_the_hubs_reason_is_given(status, reason, message):
    error = OSError("a long text")
    error.response = SimpleNamespace(status_code=status, headers={"X-Error-Message": reason})
    with pytest.raises(PublishError) as caught, hub_errors("repo", "a/b"):
        raise error
    assert str(caught.value).startswith(message)


def test_html_is_no_answer_of_a_hub():
    with pytest.raises(PublishError, match="answered something else than a hub does"), hub_errors("repo", "a/b"):
        json.loads("<html>")


def test_a_folder_with_the_name_of_a_hub_id_is_told_apart(tmp_path, monkeypatch):
    """`code` takes hub ids only, so a folder of that name is not its base; who meant it is told."""

    def offline(*args):
        raise AssemblyError("base: demo/checkpoint cannot be reached")

    monkeypatch.setattr("hub.planning.listing", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssemblyError, match=r"cannot be reached$"):
        plan_repository("demo/checkpoint", "a/c", kind=CODE_ONLY)
    (tmp_path / "demo" / "checkpoint").mkdir(parents=True)
    with pytest.raises(AssemblyError, match=r"cannot be reached \(the folder of that name is not looked at"):
        plan_repository("demo/checkpoint", "a/c", kind=CODE_ONLY)


def test_a_hub_that_says_nothing_is_left(monkeypatch):
    def info(*_args, timeout=None, **_kwargs):
        raise TimeoutError(f"timed out after {timeout}")

    monkeypatch.setattr(HfApi, "model_info", info)
    with pytest.raises(PublishError, match=r"timed out after 30\.0"):
        plan_pull_request("a/b")
    with pytest.raises(AssemblyError, match=r"timed out after 30\.0"):
        plan_repository("a/b", "a/c")


def test_a_hub_that_fails_is_not_taken_for_one_without_the_repository(hub, script):
    hub.fail("GET", r"^/api/models/ada/fails", 500, times=20)
    assert "HTTP 500" in script("repo", "ada/fails", "--base", BASE, code=1)


def test_an_offline_client_says_so():
    with pytest.raises(PublishError, match="switched off by HF_HUB_OFFLINE"), hub_errors("repo", "a/b"):
        raise OfflineModeIsEnabled


def test_a_pull_request_to_a_base_without_a_processor_config(hub, script):
    """The official repository has one; a fine-tune's may not, and then transformers reads the preprocessor's."""
    tokenizer = (CHECKPOINTS["shapes"] / "tokenizer_config.json").read_bytes()
    files = {name: data for name, data in checkpoint().items() if name != "processor_config.json"}
    hub.add("org/fewer", {**files, "tokenizer_config.json": tokenizer})
    script("pr", "org/fewer", token=READER)
    assert "processor_config.json" not in hub.repos["org/fewer"].files("refs/pr/1")
    assert script("verify", "org/fewer", "--revision", "refs/pr/1", token=READER).endswith("The same.\n")


def test_the_line_of_an_error_that_says_why():
    stderr = "Traceback (most recent call last):\n  File x\nValueError: why\n\nhint: none\nFetching 1 file\n"
    assert reason_of(stderr) == "ValueError: why"
    assert reason_of("killed\n") == "killed" and reason_of("") == "no message"


def test_licences_are_known_by_whole_words_at_the_top():
    legal = ["LICENSE", "LICENSE [v1].md", "Licence-Weights.txt", "THIRD_PARTY_NOTICES.txt", "COPYING"]
    others = ["license.safetensors", "unlicensed.txt", "x/LICENSE", "LICENSE-CODE", "license.py", "noticed.json"]
    origin = Origin(BASE, "c0ffee", None, dict.fromkeys(legal + others, 1), "")
    assert origin.legal_files == sorted(legal)


def test_a_base_is_named_at_the_top_of_a_card_only():
    inner = model_card(OWN, "ada/first", Origin(BASE, "c0ffee", None, {}, ""))
    outer = model_card(OWN, "ada/second", Origin("/a/folder", None, None, {}, inner))
    assert origin_of(inner) == (BASE, "c0ffee", None) and BASE in outer and origin_of(outer) is None
    assert is_as_made(outer) and not is_as_made(outer + "x") and not is_as_made(outer.replace("second", "third"))


@pytest.mark.parametrize(
    ("card", "message"), [(b"---\na: [b\n: c\n---\n", "README.md is not YAML"), (b"\xff\xfe", "not UTF-8")]
)
def test_a_card_that_cannot_be_read_is_one_line(tmp_path, card, message):
    for path in CHECKPOINTS["shapes"].iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "README.md").unlink(missing_ok=True)
    (tmp_path / "README.md").write_bytes(card)
    with pytest.raises(AssemblyError, match=message) as caught:
        plan_repository(str(tmp_path), "ada/x")
    assert "\n" not in str(caught.value)


def test_tokens_are_redacted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-another-shape")
    assert redacted("a hf_abcdefghijkl b secret-of-another-shape") == "a *** b ***"


def test_description_takes_the_records_with_a_speedup(tmp_path):
    record = {"machine": "M", "dtype": "bfloat16", "transformers": "5", "date": "D", "workload": "long", "rows": 8}
    measured = {**record, "new_tokens": 64, "rows_per_second": 1.0, "stock_speedup": 2.0}
    lines = [measured, {"benchmark": "modes", "machine": "M"}, {**measured, "stock_speedup": None, "machine": "alone"}]
    (tmp_path / "README.md").write_text("# T\n\nIntro.\n", encoding="utf-8")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("", encoding="utf-8")
    (tmp_path / "benchmarks" / "results.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    described = pull_request_description("a/b", tmp_path)
    assert "| M, bfloat16, transformers 5, D | long, 64 new tokens | 8 | 1.000 | 2.00 × |" in described
    assert described.count("new tokens") == 1


def test_only_the_hubs_errors_are_the_hubs():
    with pytest.raises(KeyError), hub_errors("repo", "a/b"):
        raise KeyError("dtype")
    with pytest.raises(PublishError, match="a/b: the hub did not give it: disk full"), hub_errors("repo", "a/b"):
        raise OSError("disk full")


def test_card_of_a_base_without_one():
    origin = Origin("/some/folder", None, None, {"config.json": 1}, "")
    card = model_card(OWN, "ada/own", origin)
    assert metadata(card.encode()) == {"pipeline_tag": "image-text-to-text", "library_name": "transformers"}
    assert origin_of(card) is None and "The base checkpoint with a `generate`" in card and "the base's licence" in card


def test_code_at_a_revision_is_loaded_at_that_revision():
    origin = Origin(BASE, "c0ffee", None, {}, "")
    config, model, processor = loading_lines(CODE_ONLY, "ada/code", origin, "refs/pr/2")
    assert 'revision="refs/pr/2", trust' in config and 'code_revision="refs/pr/2", trust' in model
    assert BASE in model and 'revision="refs/pr/2"' in processor


def test_the_server_hashes_as_git_does():
    repo = Repo("a/b", "a")
    assert repo.commit("main", {"x": b""}) == repo.refs["main"]
    assert git_oid(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
