"""serve.py as its users meet it: a process and its signals, the openai package, curl, a browser."""

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

import serve
from tests.conftest import ROOT
from tests.test_serving import KEY, PICTURES, Running, alone, chat, uri

PICTURE = PICTURES / "012.png"
QUESTION = "Locate all the instances that matches the following description: red circle."


def test_usage_errors_come_before_torch(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.touch()
    for arguments, named in [
        (["--rows", "0"], "--rows"),
        (["--max-waiting", "x"], "--max-waiting"),
        (["--api-key", ""], "--api-key"),
        (["--api-key-file", str(empty)], "--api-key"),
        (["--api-key-file", str(tmp_path / "none")], "--api-key-file"),
        (["--api-key", "a", "--api-key-file", str(empty)], "--api-key-file"),
    ]:
        with pytest.raises(SystemExit) as ended:
            serve.main(arguments)
        assert ended.value.code == 2
        assert named in capsys.readouterr().err


# ---- a process of its own

BREAKS = """
import os, signal, sys, pathlib, hub.engine_process, hub.loading, serve
load, flag = hub.loading.load, pathlib.Path(sys.argv[1])
def broken(*args, **kwargs):
    model, processor = load(*args, **kwargs)
    def hook(*_):
        import time; time.sleep(0.05)
        if flag.exists():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
    model.get_input_embeddings().register_forward_hook(hook)
    return model, processor
if sys.argv[2:] == ["engine"]:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(hub.engine_process.main(broken))
hub.engine_process.EngineProcess.command = (sys.executable, "-c", os.environ["BREAKS"], str(flag), "engine")
sys.exit(serve.main(sys.argv[2:]))
"""


class Process:
    """serve.py on a port of its own, a little slowed down; a device error comes once `flag` is there."""

    def __init__(self, folder, *arguments):
        self.flag, self.log = folder / "flag", folder / "log"
        command = [sys.executable, "-c", BREAKS, str(self.flag), "--port", "0", "--rows", "4", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), "BREAKS": BREAKS}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log, env=environment)
        self.url = None
        while self.url is None:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
            found = re.search(r"Uvicorn running on (http://127.0.0.1:\d+)", self.log.read_text())
            self.url = found and found[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def ask(self, stream):
        return httpx.post(f"{self.url}/v1/chat/completions", json=chat(stream=stream), timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(tmp_path, number):
    with Process(tmp_path) as server, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.ask, index % 2 == 0) for index in range(8)]
        arrived = 0
        while arrived < 8:
            told = httpx.get(f"{server.url}/metrics", timeout=60).text
            arrived = sum(map(float, re.findall(r"^locateanything_rows(?:_admitted|_total\{.*\}) (.*)$", told, re.M)))
        for each in (psutil.Process(server.process.pid).children()[0], server.process):  # systemd tells all
            each.send_signal(number)
        assert [one.result().status_code for one in asked] == [200] * 8
        assert server.process.wait(20) == 0


@pytest.mark.slow
def test_a_device_error_is_told_and_ends_the_process_with_1(tmp_path):
    with Process(tmp_path) as server, ThreadPoolExecutor(6) as pool:
        assert server.ask(False).status_code == 200
        server.flag.touch()
        responses = list(pool.map(server.ask, [False] * 4))
        assert {response.status_code for response in responses} == {500}
        assert server.process.wait(20) == 1
        assert "illegal memory access" in server.log.read_text()


@pytest.mark.slow
def test_an_engine_whose_process_is_killed_ends_the_server_with_1(tmp_path):
    with Process(tmp_path) as server, ThreadPoolExecutor(6) as pool:
        assert server.ask(False).status_code == 200
        asked = [pool.submit(server.ask, index == 0) for index in range(4)]
        (engine,) = psutil.Process(server.process.pid).children()
        engine.kill()
        assert {one.result().status_code for one in asked} <= {200, 500}
        assert server.process.wait(20) == 1
        assert "ended with -9" in server.log.read_text()


@pytest.mark.slow
def test_a_prompt_over_the_limit_is_refused_before_anything_streams(tmp_path):
    with Process(tmp_path) as server:
        for stream in (False, True):
            body = chat("red circle " * 9000, stream=stream)
            response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            assert response.status_code == 400 and "limit" in response.json()["error"]["message"]
        assert server.ask(True).status_code == 200


@pytest.mark.slow
def test_a_key_of_a_file_is_asked_for_and_nowhere_in_the_log(tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    with Process(tmp_path, "--api-key-file", str(tmp_path / "key")) as server:
        for key in (KEY, f"{KEY}x"):
            response = httpx.get(f"{server.url}/v1/models?key={key}", headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == (200 if key == KEY else 401)
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert KEY not in server.log.read_text()


@pytest.mark.slow
def test_a_port_that_is_taken_and_a_model_that_is_not_there(tmp_path):
    with Running() as running:
        port = str(running.address[1])
        taken = subprocess.run(
            [sys.executable, "serve.py", "--port", port], cwd=ROOT, capture_output=True, check=False
        )
    assert taken.returncode == 3
    assert b"in use" in taken.stderr
    command = [sys.executable, "serve.py", "--model", str(tmp_path / "none")]
    missing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (missing.returncode, missing.stderr.splitlines()[-1].startswith("serve.py: ")) == (1, True)
    assert "Traceback" not in missing.stderr


# ---- clients that others wrote


@pytest.fixture(scope="module")
def server():
    with Running(key=KEY) as running:
        yield running


def content():
    return chat(QUESTION)["messages"]


@pytest.mark.slow
def test_the_openai_package(server):
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo"]
    settings = {"model": "demo", "messages": content(), "max_tokens": 64}
    text = alone(QUESTION, ["012.png"], max_new_tokens=64, generation_mode="verified")[1]
    extra = {"generation_mode": "verified"}
    whole = client.chat.completions.create(**settings, logprobs=True, extra_body=extra)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(token.token for token in whole.choices[0].logprobs.content) == text
    again = [*content(), whole.choices[0].message, {"role": "user", "content": "And squares?"}]
    assert client.chat.completions.create(**{**settings, "messages": again}).choices[0].message.content
    pieces = client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}, extra_body=extra
    )
    pieces = list(pieces)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
    assert pieces[-1].usage == whole.usage
    with client.chat.completions.stream(**settings, extra_body=extra) as stream:
        assert stream.get_final_completion().choices[0].message.content == text

    for kind, wrong in [
        (openai.NotFoundError, {"model": "gpt-4o"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"extra_body": {"generation_mode": "quick"}}),
    ]:
        with pytest.raises(kind) as refused:
            client.chat.completions.create(**{**settings, **wrong})
        assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="other").models.list()


@pytest.mark.slow
def test_the_openai_package_async(server):
    import openai

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            create = client.chat.completions.create
            whole = create(model="demo", messages=content(), max_tokens=64)
            stream = await create(model="demo", messages=content(), max_tokens=64, stream=True)
            pieces = [piece.choices[0].delta.content or "" async for piece in stream]
            return (await whole).choices[0].message.content, "".join(pieces)

    text = alone(QUESTION, ["012.png"], max_new_tokens=64)[1]
    assert asyncio.run(ask()) == (text, text)


@pytest.mark.slow
def test_curl(server):
    def curl(*arguments):
        command = ["curl", "-sS", "-H", f"Authorization: Bearer {KEY}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    url = f"{server.url}/v1/locate"
    form = json.loads(curl(url, "-F", f"image=@{PICTURE}", "-F", "queries=red circle", "-F", "queries=orange square"))
    assert [answer["query"] for answer in form["answers"]] == ["red circle", "orange square"]
    body = json.dumps({"image": uri(PICTURE.read_bytes()), "queries": ["red circle", "orange square"]})
    assert json.loads(curl(url, "--json", body)) == form
    lines = curl("-N", url, "-F", f"image=@{PICTURE}", "-F", "queries=red circle", "-F", "stream=true").splitlines()
    assert lines[-2] == "data: [DONE]"
    large = subprocess.run(
        ["curl", "-sS", url, "-H", f"Authorization: Bearer {KEY}", "--data-binary", "@-", "-w", "%{http_code}"],
        input=b"x" * (21 * 2**20), capture_output=True, check=False,
    )  # fmt: skip
    assert large.stdout.endswith(b"413")
    assert json.loads(curl(url, "--json", "{}"))["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, server, **options):
    """The page, with what the browser complained of."""
    page = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options).new_page()
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(server.url)
    return page


def boxes_of(page):
    sides = "['x', 'y', 'width', 'height'].map(name => +box.getAttribute(name))"
    return page.evaluate(f"[...document.querySelectorAll('#boxes rect')].map(box => {sides})")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1280, 800), (375, 740)], ids=["desk", "phone"])
def test_the_page_draws_what_the_server_finds(server, browser, size, tmp_path):
    page = opened(browser, server, viewport={"width": size[0], "height": size[1]})
    page.fill("#queries", "red circle\norange square")
    page.click("summary")
    page.fill("#key", KEY)
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    page.evaluate(  # a drop
        """data => {
          const transfer = new DataTransfer(), bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
          transfer.items.add(new File([bytes], "it's.png", {type: "image/png"}));
          const event = new DragEvent("drop", {dataTransfer: transfer, bubbles: true});
          document.getElementById("drop").dispatchEvent(event);
        }""",
        picture,
    )
    page.click("#go")
    page.wait_for_selector("#json:not([disabled])")
    page.click("#json")
    told = json.loads(page.evaluate("navigator.clipboard.readText()"))
    expected = [[x, y, right - x, bottom - y] for x, y, right, bottom in (one["box"] for one in told["detections"])]
    assert expected
    assert boxes_of(page) == [pytest.approx(box) for box in expected]
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    page.hover("#boxes rect >> nth=0")
    first = told["detections"][0]
    assert page.inner_text("#tip") == f"{first['label']} {first['score']:.2f}"
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    # the curl line, as a shell runs it
    page.click("#curl")
    line = page.evaluate("navigator.clipboard.readText()")
    (tmp_path / "it's.png").write_bytes(PICTURE.read_bytes())
    ran = subprocess.run(
        line, shell=True, cwd=tmp_path, env={**os.environ, "KEY": KEY}, capture_output=True, check=True
    )
    assert json.loads(ran.stdout) == told
    assert not page.complaints


@pytest.mark.slow
def test_the_page_from_the_keyboard_and_what_it_says_of_errors(server, browser):
    page = opened(browser, server)
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Tab")
        page.wait_for_selector("#file:focus")  # a key pressed at once would come before playwright listens
        page.keyboard.press("Enter")
    chooser.value.set_files(PICTURE)
    page.wait_for_selector("#stage:not([hidden])")
    page.keyboard.press("Tab")
    page.keyboard.type("red circle")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status.bad")
    assert "API key" in page.inner_text("#status")
    page.keyboard.type(KEY)  # the field has opened and is in focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#json:not([disabled])")
    page.focus("#boxes rect")
    assert "red circle" in page.inner_text("#tip")


@pytest.mark.slow
def test_a_label_that_is_markup_stays_a_text(server, browser):
    page = opened(browser, server)
    label = "<img src=x onerror=alert(1)>"
    page.route(
        "**/v1/locate",
        lambda route: route.fulfill(
            content_type="text/event-stream",
            body="data: " + json.dumps({"detections": [DETECTION | {"label": label}]}) + "\n\ndata: "
            + json.dumps({"detections": [DETECTION | {"label": label}], "answers": []}) + "\n\ndata: [DONE]\n\n",
        ),
    )  # fmt: skip
    page.set_input_files("#file", PICTURE)
    page.fill("#queries", "x")
    page.click("#go")
    page.wait_for_selector("#json:not([disabled])")
    assert page.inner_text("#list span") == label
    assert page.locator("#list img, #tip img").count() == 0
    assert not page.complaints


DETECTION = {"class_id": 0, "box": [1.0, 1.0, 9.0, 9.0], "point": None, "score": 0.5, "label_score": 1.0}
