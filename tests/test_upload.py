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
from pathlib import Path
from typing import Any

import pytest
import yaml

from hub.assembly import MODEL, MODEL_ENTRIES, WEIGHTS, Base, remote_code_files
from hub.card import MARK, VARIANTS, is_legal, model_card, pull_request_description
from hub.errors import HubError, explain, redacted
from hub.publishing import TITLE
from tests.conftest import CHECKPOINTS, GOLDENS, ROOT, STOCK_CONFIGURATION, cases_of
from tests.hub_server import READER, WRITER, Hub, Repo, git_oid, sha256

BASE, OWN, CODE = "nvidia/LocateAnything-3B", "ada/own", "ada/code"
WEIGHT = "model.safetensors"
STOCK = tuple(f"{part}_locateanything.py" for part in ("configuration", "modeling", "processing", "image_processing"))
CARD = "---\nlicense: other\nlicense_name: nvidia\nlicense_link: LICENSE\ntags:\n- grounding\n---\n# The base's card\n"
# Runs command lines one after another: starting Python for each would be most of their time
SHELL = """
import contextlib, io, json, os, sys, traceback
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
        except Exception:
            code = traceback.format_exc()
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
        self._shell = self.start("-c", SHELL, str(ROOT), stdin=subprocess.PIPE)

    def start(self, *arguments: str, token: str = WRITER, **pipes: int) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
        environment = self.environment | ({"HF_TOKEN": token} if token else {})
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.home, env=environment, text=True, encoding="utf-8", **pipes
        )

    def __call__(self, *arguments: str, token: str = WRITER, code: int = 0) -> str:
        """What a command line prints: to stdout, or the one line of its error if it is to fail."""
        assert self._shell.stdin is not None and self._shell.stdout is not None
        print(json.dumps({"arguments": arguments, "token": token}), file=self._shell.stdin, flush=True)
        line = self._shell.stdout.readline()
        done: dict[str, Any] = json.loads(line or json.dumps({"code": self._shell.communicate()[1]}))
        assert done["code"] == code, done
        if code == 0:
            return done["out"]
        # Beside the client's progress bars
        errors = [line for line in done["err"].splitlines() if line.startswith("upload_to_hub.py: ")]
        assert len(errors) == 1 and "Traceback" not in done["err"], done["err"]
        assert not token or token not in done["err"] + done["out"]
        return errors[0]

    def close(self) -> None:
        self._shell.communicate()


def checkpoint(**more: bytes) -> dict[str, bytes]:
    """A repository laid out like the official one: stock code that must not run, a licence, a notice, a card."""
    files = {path.name: path.read_bytes() for path in CHECKPOINTS["shapes"].iterdir()}
    config = json.loads(files["config.json"])
    config["vision_config"]["auto_map"] = {"AutoModel": "moonshotai/absent--modeling_moonvit.Absent"}
    files["config.json"] = json.dumps(config, indent=2).encode()
    files |= dict.fromkeys(STOCK, b"raise SystemExit('stock code was run')\n")
    # Of a pull request, the configuration class is the repository's own
    files[STOCK[0]] = STOCK_CONFIGURATION.encode()
    return files | {"LICENSE": b"NVIDIA's", "NOTICE": b"notice", "README.md": CARD.encode()} | more


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        hub.add(BASE, checkpoint(**{"assets/a.png": b"png"}))
        yield hub


@pytest.fixture(scope="module")
def script(hub, tmp_path_factory):
    script = Script(hub.url, tmp_path_factory.mktemp("home"))
    yield script
    script.close()


@pytest.fixture(scope="module")
def published(hub, script) -> dict[str, str]:
    """Both repositories and the three pull requests, and what the script said of each."""
    said = {"own": script("repo", OWN, "--base", BASE), "code": script("code", CODE, "--base", BASE)}
    for variant in VARIANTS:
        option = [] if variant == "default" else [f"--{variant}"]
        said[variant] = script("pr", BASE, *option, "--project-url", "https://host/project", token=READER)
    return said


def code_files(entries: tuple[str, ...] = (*MODEL_ENTRIES, "processing")) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in remote_code_files(entries)}


def metadata(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_own_repository_is_code_and_weights_in_one_commit(hub, published):
    repo, base = hub.repos[OWN], hub.repos[BASE].files()
    assert [message[:2] for message in repo.messages] == [("main", "initial commit"), ("main", TITLE)]
    files = repo.files()
    assert set(files) == set(base) - set(STOCK) | code_files().keys() | {"LICENSE-CODE"}
    assert code_files().items() <= files.items() and files["LICENSE-CODE"] == (ROOT / "LICENSE").read_bytes()
    for name in (WEIGHT, "LICENSE", "NOTICE", "assets/a.png", "vocab.json", "tokenizer.json"):
        assert files[name] == base[name]
    assert json.loads(files["config.json"])["auto_map"]["AutoConfig"] == "configuration.LocateAnythingConfig"
    assert f'AutoModel.from_pretrained("{OWN}", trust_remote_code=True' in published["own"]


def test_code_only_repository_names_itself_and_holds_no_weights(hub, published):
    files = hub.repos[CODE].files()
    assert not any(Path(name).match(pattern) for name in files for pattern in WEIGHTS)
    assert code_files().items() <= files.items()
    assert {"LICENSE", "NOTICE", "tokenizer.json", "merges.txt"} <= files.keys() and "assets/a.png" not in files
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        assert all(value.startswith(f"{CODE}--") for value in json.loads(files[name])["auto_map"].values())
    lines = [line.strip() for line in published["code"].splitlines()]
    assert f'config = AutoConfig.from_pretrained("{CODE}", trust_remote_code=True)' in lines
    assert f'model = AutoModel.from_pretrained("{BASE}", config=config, trust_remote_code=True, dtype="auto")' in lines


def test_cards_carry_the_weights_licence(hub, published):
    for name in (OWN, CODE):
        card = hub.repos[name].files()["README.md"]
        expected = {"license": "other", "license_name": "nvidia", "license_link": "LICENSE", "tags": ["grounding"]}
        expected |= {"pipeline_tag": "image-text-to-text", "library_name": "transformers", "base_model": BASE}
        assert metadata(card) == expected
        assert "`LICENSE`, `NOTICE`" in card.decode() and MARK in card.decode()
        assert ("# The base's card" in card.decode()) == (name == OWN)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pull_request_changes_code_and_auto_maps_only(hub, script, published, variant):
    repo, number = hub.repos[BASE], list(VARIANTS).index(variant) + 1
    before, after = repo.files(), repo.files(f"refs/pr/{number}")
    code = code_files() if variant == "processor" else code_files(MODEL_ENTRIES)
    assert after.keys() == before.keys() | code.keys() and code.items() <= after.items()
    assert len(code) <= (17 if variant == "processor" else 14)
    changed = {name for name in before if before[name] != after[name]}
    processors = {"preprocessor_config.json", "processor_config.json"} if variant == "processor" else set()
    assert changed == {"config.json"} | processors
    for name in changed:
        old, new = json.loads(before[name]), json.loads(after[name])
        named = {**old.pop("auto_map")}, new.pop("auto_map")
        old.pop("image_processor_type", None)  # by which 4.57 would look for a class of its own
        assert old == new
        lines = difflib.unified_diff(before[name].decode().split("\n"), after[name].decode().split("\n"), n=0)
        assert all('": "' in line for line in list(lines)[2:] if line[0] in "+-")
        if name == "config.json":
            switched = ["AutoModelForImageTextToText"]
            switched += [] if variant == "opt-in" else ["AutoModel", "AutoModelForCausalLM"]
            assert named[1] == {**named[0], **dict.fromkeys(switched, MODEL)}
    description = next(text for ref, _, text in repo.messages if ref == f"refs/pr/{number}")
    assert description.count("\n") < 40
    for part in (VARIANTS[variant], "https://host/project", 'revision="refs/pr/N"', f"{len(code)} Python"):
        assert part in description
    assert f"{hub.url}/{BASE}/discussions/{number}" in published[variant]
    assert f'("{BASE}", revision="refs/pr/{number}", trust_remote_code=True' in published[variant]


def test_a_pull_request_that_is_open_is_brought_up_to_date(hub, script, published):
    repo = hub.repos[BASE]
    count, after = len(repo.messages), repo.files("refs/pr/1")
    assert "Already there" in script("pr", BASE, token=READER) and len(repo.messages) == count
    repo.commit("refs/pr/1", {**after, "vision.py": b"stale"})
    assert "refs/pr/1" in script("pr", BASE, token=READER)
    assert len(repo.pulls) == 3 and repo.files("refs/pr/1") == after


def test_what_the_maintainers_read_is_what_was_measured():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    said = pull_request_description("a/b", "default", 1, 1).splitlines()
    rows = [line.strip("| ").split(" | ") for line in said if line.startswith("| ") and "×" in line]
    assert len(rows) >= 3
    for workload, *numbers in rows:
        line = next(line for line in results.splitlines() if line.startswith(f"| {workload} | {numbers[0]}"))
        assert all(number in line for number in numbers)


def test_published_again_changes_nothing_and_what_would_be_read_goes(hub, script, published):
    repo = hub.repos[OWN]
    assert "Already there" in script("repo", OWN, "--base", BASE)
    assert len(repo.messages) == 2
    whole = repo.files()
    gone = ["retired.py", "old.safetensors", "model.safetensors.index.json", "chat_template.json"]
    changed = {"vision.py": b"stale", "mine.txt": b"kept", "README.md": b"My own.\n"}
    repo.commit("main", {**whole, **dict.fromkeys(gone, b"old"), **changed})
    expected = [*(f"deletes {name}, which" for name in gone), "leaves README.md, which this script did not write"]
    for options in (["--dry-run"], []):
        said = script("repo", OWN, "--base", BASE, *options)
        assert all(part in said for part in expected), said
    assert repo.files() == {**whole, "mine.txt": b"kept", "README.md": b"My own.\n"}
    repo.commit("main", whole)


LOADER = """
import json, sys
from PIL import Image
import transformers
printed, cases, images = json.loads(sys.stdin.read())
answers = {}
for name, text in printed.items():
    scope = {key: getattr(transformers, key) for key in
        ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor")}
    exec(text, scope)
    chats = [[{"role": "user", "content": [
        {"type": "image", "image": Image.open(f"{images}/{case['images'][0]}")},
        {"type": "text", "text": case["question"]}]}] for case in cases]
    model, processor = scope["model"].eval(), scope.get("processor", globals().get("processor"))  # or the first one's
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, padding=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:].tolist()
    answers[name] = [row[: len(case["output_ids"])] for row, case in zip(output, cases)]
    assert type(model).__name__ == "LocateAnythingBatchedForConditionalGeneration"
    ours = type(model.config).__module__.endswith(".configuration")
    assert ours == (name in ("own", "code")), type(model.config)
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_what_was_published_loads_as_printed_and_answers_the_goldens(hub, script, published):
    cases = [
        case
        for case in cases_of("shapes")
        if case["generation_mode"] == "hybrid" and case["layout"] == "image-question" and "seed" not in case
        if case["max_new_tokens"] == 256 and "repetition_penalty" not in case and case["num_tokens"] < 100
    ][:6]
    printed = {
        # The repository's own processor, which a pull request leaves there, is none of ours to run here
        name: "\n".join(
            line.strip()
            for line in said.splitlines()
            if "from_pretrained" in line and not (name in ("default", "opt-in") and "AutoProcessor" in line)
        )
        for name, said in published.items()
    }
    since = len(hub.requests)
    loader = script.start("-c", LOADER, token="", stdin=subprocess.PIPE)
    out, err = loader.communicate(json.dumps([printed, cases, str(GOLDENS / "shapes" / "images")]))
    assert loader.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == {name: [case["output_ids"] for case in cases] for name in printed}
    assert not [r for r in hub.requests[since:] if any(name in r for name in (*STOCK[1:], "moonshotai"))]


@pytest.mark.slow
def test_verify(hub, script, published):
    for repo, *options in ((OWN,), (CODE,), (BASE, "--revision", "refs/pr/1")):
        assert "<ref>orange circle</ref>" in script("verify", repo, *options)  # as this checkpoint answers
    files = hub.repos[OWN].files()
    hub.repos[OWN].commit("main", {**files, "vision.py": b"raise SystemExit"})
    assert "has another vision.py than this project" in script("verify", OWN, code=1)
    hub.repos[OWN].commit("main", files)
    assert "than this project, or none" in script("verify", BASE, code=1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("repo", "ada/dry", "--base", BASE, "--private"), ["create private repository ada/dry", "4.67MB  " + WEIGHT]),
        (("code", "ada/dry", "--base", BASE), ["edit", "config.json", "README.md", "ada/dry"]),
        (("pr", BASE), ["a new pull request", "vision.py", BASE]),
    ],
)
def test_dry_run_prints_and_writes_nothing(hub, script, arguments, named):
    since = len(hub.requests)
    said = script(*arguments, "--dry-run")
    assert all(part in said for part in named), said
    assert said.endswith("Nothing was published.\n") and "ada/dry" not in hub.repos
    assert not [r for r in hub.requests[since:] if not r.startswith(("GET", "HEAD")) or r.endswith(WEIGHT)]


@pytest.mark.slow
def test_killed_upload_leaves_nothing_and_goes_on(hub, script):
    """Killed while the weights are on their way: the repository stays empty, and what is there is not sent again."""
    reached, release = threading.Event(), threading.Event()
    files = hub.repos[BASE].files()
    second, first = sha256(files[WEIGHT]), sha256(files["assets/a.png"])

    def hold() -> None:
        reached.set()
        release.wait(30)

    hub.fail("PUT", rf"/lfs/ada/killed/{second}", hold)
    command = ("repo", "ada/killed", "--base", BASE)
    running = script.start(str(ROOT / "upload_to_hub.py"), *command)
    try:
        assert reached.wait(60)
        for _ in range(300):
            if first in hub.repos["ada/killed"].stored:
                break
            time.sleep(0.1)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
        release.set()
    assert set(hub.repos["ada/killed"].files()) == {".gitattributes"}
    since = len(hub.requests)
    script(*command)
    assert hub.repos["ada/killed"].files()[WEIGHT] == files[WEIGHT]
    sent = [r for r in hub.requests[since:] if r.startswith("PUT")]
    assert any(second in r for r in sent) and not any(first in r for r in sent)


@pytest.mark.parametrize(
    ("pattern", "action", "message"),
    [
        (r"/commit/", 500, "500"),
        (r"/commit/", 412, "changed meanwhile; run the command again"),
        (r"/commit/", "cut", "cannot be reached, or broke off"),
        (r"/preupload/", 403, "broken"),
    ],
)
@pytest.mark.slow
def test_failure_leaves_nothing_and_the_next_run_goes_on(hub, script, pattern, action, message):
    name = f"ada/failed-{action}"
    hub.fail("POST", rf"/api/models/{name}{pattern}", action)
    assert message in script("repo", name, "--base", BASE, code=1)
    assert set(hub.repos[name].files()) == {".gitattributes"}
    hub.faults.clear()
    stored, since = set(hub.repos[name].stored), len(hub.requests)
    assert "Published" in script("repo", name, "--base", BASE)
    assert hub.repos[name].files().keys() >= {WEIGHT, "config.json", "processing.py"}
    assert not [r for r in hub.requests[since:] if r.startswith("PUT") and r.rsplit("/", 1)[-1] in stored]


def test_folder_as_base_private_repository(hub, script):
    script("repo", "ada/folder", "--base", str(CHECKPOINTS["shapes"]), "--private")
    repo = hub.repos["ada/folder"]
    card = repo.files()["README.md"]
    assert str(CHECKPOINTS["shapes"]) not in card.decode() + "".join(repo.messages[-1])
    assert repo.private and repo.files()[WEIGHT] == hub.repos[BASE].files()[WEIGHT]
    assert "license" not in metadata(card) and "base_model" not in metadata(card)


UNKNOWN = "hf_unknownunknownunknown"


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (("repo", "ada/x", "--base", BASE), UNKNOWN, "token: none, or one that the hub does not know"),
        (("pr", BASE), "", "token: none was found; set HF_TOKEN"),
        (("repo", "ada/x", "--base", BASE), READER, "You don't have the rights"),
        (("repo", "eve/x", "--base", BASE), WRITER, "You don't have the rights"),
        (("pr", "nobody/nothing"), WRITER, "nobody/nothing is neither a folder nor a hub repository"),
        (("repo", "ada/x--y", "--base", BASE), WRITER, "ada/x--y"),
        (("pr", "ada/clash"), WRITER, "repo: ada/clash has a vision.py of its own"),
        (("pr", "ada/bert"), WRITER, "base: ada/bert lacks preprocessor_config.json"),
        (("repo", "ada/weights", "--base", BASE, "--private"), WRITER, "private: ada/weights is there and public"),
        (("repo", "ada/x", "--base", "no such base"), WRITER, "no such base is neither a folder nor"),
        (("repo", "ada/x", "--base", "org/gated"), WRITER, "Accept its terms on its page"),
        (("repo", "ada/x", "--base", BASE, "--revision", "v9"), WRITER, "v9"),
        (("repo", BASE, "--base", BASE), WRITER, "is the base itself; open a pull request"),
        (("repo", "ada/bert", "--base", BASE), WRITER, "holds a model of type 'bert'"),
        (("code", "ada/notes", "--base", BASE), WRITER, "repo: ada/notes holds a model of type 'unknown'"),
        (("code", "ada/weights", "--base", BASE), WRITER, "repo: ada/weights holds weights"),
        (("code", "ada/x", "--base", str(CHECKPOINTS["shapes"])), WRITER, "is neither a folder nor a hub repository"),
        (("--base", "org/gated", "--local-dir", "built"), WRITER, "Accept its terms"),
        (("verify", "nobody/nothing"), WRITER, "nobody/nothing"),
    ],
)
def test_refusals_are_one_line(hub, script, arguments, token, message):
    if "org/gated" not in hub.repos:
        hub.add("org/gated", checkpoint(), gated=True)
        hub.add("ada/bert", {"config.json": b'{"model_type": "bert"}'})
        hub.add("ada/clash", checkpoint(**{"vision.py": b"theirs"}))
        hub.add("ada/notes", {"notes.txt": b"mine"})
        hub.add("ada/weights", {"config.json": b'{"model_type": "locateanything"}', WEIGHT: b"w"})
    state = {name: dict(repo.refs) for name, repo in hub.repos.items()}
    assert message in script(*arguments, token=token, code=1)
    assert {name: dict(repo.refs) for name, repo in hub.repos.items()} == state


def test_no_network_is_one_line(tmp_path):
    with Hub() as gone:
        endpoint = gone.url
    script = Script(endpoint, tmp_path)
    assert f"the hub at {endpoint} cannot be reached" in script("pr", BASE, code=1)
    script.close()


def test_errors_become_a_line_without_tokens(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-another-shape")
    assert redacted("a hf_abcdefghijkl b secret-of-another-shape") == "a *** b ***"
    assert explain(KeyError("a bug")) is None
    assert explain(OSError("disk\nfull, said secret-of-another-shape")) == "disk full, said ***"
    assert explain(HubError("base: x")) == "base: x"


def test_interruption_says_so(monkeypatch, capsys):
    import upload_to_hub

    monkeypatch.setattr(upload_to_hub, "plan_pull_request", lambda *_: exec("raise KeyboardInterrupt"))
    assert upload_to_hub.main(["pr", BASE]) == 130
    assert capsys.readouterr().err.startswith("upload_to_hub.py: interrupted; the same command goes on")


def test_licences_are_known_by_whole_words_at_the_top():
    legal = ["LICENSE", "LICENSE [v1].md", "Licence-Weights.txt", "THIRD_PARTY_NOTICES.txt", "COPYING"]
    others = ["license.safetensors", "unlicensed.txt", "x/LICENSE", "LICENSE-CODE", "noticed.json"]
    assert [name for name in legal + others if is_legal(name)] == legal


@pytest.mark.parametrize("card", [b"---\na: [b\n: c\n---\n", b"\xff\xfe"])
def test_a_card_that_cannot_be_read(tmp_path, card):
    (tmp_path / "README.md").write_bytes(card)
    with pytest.raises(HubError, match=r"README\.md of a/b is no model card"):
        model_card(Base("a/b", tmp_path, None, {}), "ada/x")


def test_the_server_hashes_as_git_does():
    repo = Repo("a/b", "a")
    assert repo.commit("main", {"x": b""}) == repo.refs["main"]
    assert git_oid(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
