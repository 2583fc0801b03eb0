"""A model in a process of its own: each answer is that of the golden case, and every end of the process is told."""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import defaultdict

import psutil
import pytest
import torch

from hub.engine_process import EngineProcess, load_apart
from hub.loading import ModelError
from scan.workers import scan
from serving.engine import StopTexts

from .conftest import CHECKPOINTS, GOLDENS, ROOT, model_of, processor_of
from .test_stream import FOREVER, check, request, some

pytestmark = pytest.mark.usefixtures("environment")
PICTURES = GOLDENS / "shapes" / "images"


# a process whose model says that it lies on a GPU
ELSEWHERE = """
import sys
sys.path.insert(0, sys.argv[1])
from hub import engine_process
from hub.loading import load

class Elsewhere(str):
    type = "cuda"

def elsewhere(*given, **loading):
    model, processor = load(*given, **loading)
    type(model).device = Elsewhere("cpu")
    return model, processor

engine_process.main(elsewhere)
"""


@pytest.fixture
def engine(request, monkeypatch):
    monkeypatch.setattr(EngineProcess, "command", getattr(request, "param", EngineProcess.command))
    engine, _ = load_apart(str(CHECKPOINTS["shapes"]), device="cpu")
    yield engine
    engine.close()


class Outputs:
    """What handlers are given, by request."""

    def __init__(self):
        self.of, self.changed = defaultdict(list), threading.Condition()

    def __call__(self, output):
        with self.changed:
            self.of[output.request_id].append(output)
            self.changed.notify_all()

    def wait(self, condition):
        with self.changed:
            assert self.changed.wait_for(condition, FOREVER)

    def last(self, name):
        self.wait(lambda: self.of[name] and self.of[name][-1].is_finished())
        return self.of[name][-1]


class Unread:
    """What can be pickled, and not read."""

    def __reduce__(self):
        return exec, ("raise ValueError('there')",)


@pytest.mark.parametrize(
    "engine",
    [EngineProcess.command, pytest.param((sys.executable, "-c", ELSEWHERE, str(ROOT)), marks=pytest.mark.slow)],
    ids=["cpu", "gpu"],
    indirect=True,
)
def test_requests_of_all_kinds(engine):
    """In one process, as each loads torch anew."""
    manager, outputs = engine.init_continuous_batching(max_batch_rows=4, max_queue_size=50), Outputs()
    manager.start()
    assert manager.is_running()
    cases = some(40, seed=3)
    names = [manager.add_request(**request(case), result_handler=outputs) for case in cases]
    # rows about one picture, whose patches are more than a pipe holds, and whose tensors cross it once
    picture = processor_of().questions(torch.rand(3, 700, 700).mul(255).byte().permute(1, 2, 0).numpy(), ["a", "b"])
    rows = processor_of().apply_chat_template(
        picture[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    alone = model_of("shapes").generate(**rows, max_new_tokens=16)[0, rows["input_ids"].shape[1] :].tolist()
    told = {**rows, "max_new_tokens": 16, "result_handler": outputs}
    large = [manager.add_request(**told) for _ in range(2)]
    # one that streams, one that is stopped by a text, one that is cancelled, two that are refused
    case = max(cases, key=lambda case: len(case["output_ids"]))
    streamed = manager.add_request(**request(case), streaming=True, result_handler=outputs)
    criteria = [StopTexts(["</ref>"], engine.processor, len(case["input_ids"]))]
    stopped = manager.add_request(**request(case), stopping_criteria=criteria, result_handler=outputs)
    manager.add_request([5] * 20, "cancelled", max_new_tokens=4000, eos_token_id=0, result_handler=outputs)
    manager.cancel_request("cancelled")
    for name, wrong in (("mode", {"generation_mode": "none"}), ("long", {"max_length": 3})):
        manager.add_request(**request(case, max_new_tokens=None) | wrong, request_id=name, result_handler=outputs)
    unsent = manager.add_request(**request(case), prefix_allowed_tokens_fn=lambda *_: [1], result_handler=outputs)
    assert "lambda" in outputs.last(unsent).error and outputs.last(unsent).prompt_ids == []
    with pytest.raises(ValueError, match="request_id"):
        manager.add_request([5], "cancelled", result_handler=outputs)
    manager.add_request([5], "unread", stopping_criteria=[Unread()], result_handler=outputs)
    assert outputs.last("unread").error == "ValueError: there" and outputs.last("unread").prompt_ids == []
    assert "generation_mode" in outputs.last("mode").error and outputs.last("mode").prompt_ids == []
    assert outputs.last("long").error.startswith("ValueError: ") and outputs.last("long").finish_reason == "error"
    for name, one in zip([*names, streamed], [*cases, case], strict=True):
        check(outputs.last(name), one)
    assert [outputs.last(name).generated_tokens for name in large] == [alone, alone]
    whole = case["output_ids"]
    assert all(whole[: len(part.generated_tokens)] == part.generated_tokens for part in outputs.of[streamed])
    assert len(outputs.of[streamed]) > 2
    assert outputs.last(stopped).finish_reason == "stop"
    assert engine.processor.decode(outputs.last(stopped).generated_tokens).endswith("</ref>")
    assert outputs.last("cancelled").finish_reason == "cancelled"
    manager.stop()
    assert not manager.is_running() and engine._process.wait(FOREVER) == 0
    with pytest.raises(RuntimeError, match="does not run"):
        manager.add_request([5], result_handler=outputs)


@pytest.mark.slow
def test_what_waits_is_bounded_and_dropped_by_a_hard_stop(engine):
    manager, outputs = engine.init_continuous_batching(max_batch_rows=1, max_queue_size=2), Outputs()
    manager.start()
    for name in "abc":
        manager.add_request([5] * 20, name, max_new_tokens=4000, eos_token_id=0, result_handler=outputs)
    with pytest.raises(queue.Full):
        manager.add_request([5], block=False, result_handler=outputs)
    manager.stop(hard_stop=True)
    assert {outputs.last(name).finish_reason for name in "abc"} == {"error"}
    assert engine._process.wait(FOREVER) == 0


@pytest.mark.slow
def test_its_end_fails_what_is_asked_and_no_question_of_a_scan(engine):
    """A process that the system kills, as for its memory, ends the scan; what it was asked has not failed."""
    records = []
    with pytest.raises(RuntimeError, match="ended with -9"):
        for record in scan([str(PICTURES)], ["red circle"], model=engine, processor=engine.processor):
            records.append(record)
            os.kill(engine._process.pid, signal.SIGKILL)
    assert records and {record.status for record in records} == {"ok"}
    assert not engine.is_running()
    with pytest.raises(RuntimeError, match="ended with -9"):
        engine.add_request([5], result_handler=records.append)


HALF = """
import os, pickle, sys
out = sys.stdout.buffer
pickle.dump(None, out)
out.write(pickle.dumps([1] * 5000)[:100])
out.flush()
os._exit(3)
"""


@pytest.mark.slow
def test_half_of_an_output_ends_the_scan(monkeypatch):
    monkeypatch.setattr(EngineProcess, "command", (sys.executable, "-c", HALF))
    with pytest.raises(RuntimeError, match="ended with 3"):
        list(scan([str(PICTURES)], ["red circle"], model=str(CHECKPOINTS["shapes"])))


@pytest.mark.slow
def test_a_scan_that_cannot_begin_leaves_no_process():
    children = psutil.Process().children()
    for wrong in ({"task": "none"}, {"max_batch_rows": 0}):
        with pytest.raises((ValueError, RuntimeError), match=r"task|max_batch_rows"):
            list(scan([str(PICTURES)], ["red circle"], model=str(CHECKPOINTS["shapes"]), **wrong))
        assert psutil.Process().children() == children


@pytest.mark.slow
@pytest.mark.parametrize("told", [b"", b"\x80"])
def test_who_started_it_goes_while_it_waits(told):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(EngineProcess.command, **pipes) as process:
        for name, said in ((str(CHECKPOINTS["shapes"]), {"device": "cpu"}), ("", {})):
            process.stdin.write(pickle.dumps((name, None, pickle.dumps(said))))
        process.stdin.flush()
        assert pickle.load(process.stdout) is None
        process.stdin.write(told)
        process.stdin.close()
        assert process.wait(FOREVER) == 0


@pytest.mark.slow
def test_a_model_that_does_not_load_and_a_process_that_does_not_start(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="device"):
        load_apart(str(CHECKPOINTS["shapes"]), device="cuda")
    monkeypatch.setattr(EngineProcess, "command", ("false",))
    with pytest.raises(ModelError, match="ended with 1"):
        load_apart(str(CHECKPOINTS["shapes"]), device="cpu")


@pytest.mark.slow
def test_who_started_it_goes_while_it_loads():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(EngineProcess.command, **pipes) as process:
        process.stdin.write(pickle.dumps((str(CHECKPOINTS["shapes"]), None, pickle.dumps({"device": "cpu"}))))
        process.stdout.close()
        assert b"Traceback" not in process.communicate(timeout=FOREVER)[1]
        assert process.returncode == 0
