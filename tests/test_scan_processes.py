"""The scan as processes: killed, interrupted, several at once, on Ray. Each starts torch anew, so these are slow."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from pytest import approx

from scan.records import parts, read_records

from .conftest import CHECKPOINTS, GOLDENS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("environment")]

PROJECT = Path(__file__).resolve().parent.parent
QUERIES = ("red circle", "yellow triangle")


@pytest.fixture
def folder(tmp_path):
    return filled(tmp_path)


def filled(folder):
    """Sixty frames under two names each."""
    (folder / "frames").mkdir()
    for number in range(120):
        (folder / "frames" / f"{number}.png").hardlink_to(copied(folder, number % 60))
    return folder


def copied(folder, number):
    path = folder / f"{number:03}"
    if not path.exists():
        path.write_bytes((GOLDENS / "shapes" / "images" / f"{number:03}.png").read_bytes())
    return path


def command():
    asked = [word for query in QUERIES for word in ("--query", query)]
    model = ["--model", str(CHECKPOINTS["shapes"]), "--device", "cpu", "--max-new-tokens", "64"]
    return [str(PROJECT / "locate.py"), "frames", *asked, *model, "--out", "out"]


def answers(folder):
    """All lines, without what depends on time, in an order of their own."""
    return sorted(map(comparable, read_records(folder)), key=lambda record: (record.source, record.query))


def comparable(record):
    """Scores differ by a millionth with the rows that happen to be in a batch, so their last digit may."""
    around = [
        replace(one, **{name: approx(getattr(one, name), abs=1.1e-4, rel=0) for name in ("score", "label_score")})
        for one in record.detections
    ]
    return replace(record, seconds=None, detections=tuple(around))


def lines_in(folder):
    return sum(path.read_bytes().count(b"\n") for path in parts(folder)) if folder.exists() else 0


def started_and_stopped(arguments, folder, lines, sign, times=1, parent=True):
    """Starts a scan and sends a signal to all its processes when the folder holds so many lines; or, if told, only to
    those that it started."""
    with subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True, stdout=subprocess.PIPE) as process:
        while lines_in(folder / "out") < lines and process.poll() is None:
            time.sleep(0.01)
        for each in [*psutil.Process(process.pid).children(recursive=True), *([process] if parent else [])]:
            each.send_signal(sign)
        for _ in range(times - 1):
            time.sleep(0.05)
            process.send_signal(sign)
        told = process.communicate(timeout=120)[1]
        return process.returncode, told


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    """What a scan that nothing interrupts finds."""
    folder = filled(tmp_path_factory.mktemp("whole"))
    subprocess.run([sys.executable, *command()], cwd=folder, check=True, capture_output=True)
    found = answers(folder / "out")
    assert len(found) == 240 and {record.status for record in found} == {"ok"}
    return found


def test_killed_three_times_and_continued_it_is_as_if_nothing_had_been(folder, whole):
    draw = random.Random(0)
    for part in range(3):
        at = 40 * part + draw.randrange(40)
        code, _ = started_and_stopped([sys.executable, *command()], folder, at, signal.SIGKILL)
        assert code == -signal.SIGKILL
    done = subprocess.run([sys.executable, *command()], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert answers(folder / "out") == whole
    assert lines_in(folder / "out") == 240
    assert [path.name for path in parts(folder / "out")] == ["results.jsonl"]


def test_ctrl_c_keeps_what_is_written_and_says_how_to_go_on(folder):
    code, told = started_and_stopped([sys.executable, *command()], folder, 20, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in told and "To go on: python" in told.splitlines()[-1]
    assert 20 <= len(answers(folder / "out")) == lines_in(folder / "out") < 240


def test_the_engines_process_is_killed_and_the_scan_continued(folder, whole):
    code, told = started_and_stopped([sys.executable, *command()], folder, 20, signal.SIGKILL, parent=False)
    assert code == 1
    assert "Traceback" not in told and "ended with -9" in told and "To go on: python" in told.splitlines()[-1]
    kept = answers(folder / "out")
    assert 20 <= len(kept) == lines_in(folder / "out") < 240 and {record.status for record in kept} == {"ok"}
    subprocess.run([sys.executable, *command()], cwd=folder, check=True, capture_output=True)
    assert answers(folder / "out") == whole


def test_ctrl_c_again_while_it_ends(folder):
    code, told = started_and_stopped([sys.executable, *command()], folder, 20, signal.SIGINT, times=3)
    assert code == 130
    assert "Traceback" not in told and "terminate" not in told
    assert 20 <= len(answers(folder / "out")) == lines_in(folder / "out") < 240


def test_two_processes_give_the_same_lines_and_one_goes_on_alone(folder, whole):
    # --multi_gpu is what makes accelerate start more than one process, on CPUs too; port 0 is one that is free
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--main_process_port", "0"]
    launch = [sys.executable, *launch, "--mixed_precision", "no", "--dynamo_backend", "no"]
    subprocess.run([*launch, *command()], cwd=folder, check=True, capture_output=True)
    assert answers(folder / "out") == whole
    assert [path.name for path in parts(folder / "out")] == ["results.jsonl"]
    # both killed, and another number of processes goes on
    (folder / "out").rename(folder / "first")
    started_and_stopped([*launch, *command()], folder, 20, signal.SIGKILL)
    assert 20 <= lines_in(folder / "out") < 240
    assert {path.name for path in parts(folder / "out")} <= {"results-0.jsonl", "results-1.jsonl"}
    subprocess.run([sys.executable, *command()], cwd=folder, check=True, capture_output=True)
    assert answers(folder / "out") == whole
    assert lines_in(folder / "out") == 240


def test_an_actor_of_ray_is_killed_and_nothing_is_lost_or_there_twice(folder, whole, monkeypatch):
    ray = pytest.importorskip("ray")
    from scan.ray import scan_on_ray

    for number in range(120, 600):
        (folder / "frames" / f"{number}.png").hardlink_to(copied(folder, number % 60))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.chdir(folder)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        given = {"model": str(CHECKPOINTS["shapes"]), "loading": {"device": "cpu"}, "actors": 2, "max_new_tokens": 64}
        found, killed = [], None
        for record in scan_on_ray(["frames"], QUERIES, **given):
            found.append(comparable(record))
            if killed is None:
                below = psutil.Process().children(recursive=True)
                killed = next(each for each in below if "Engine" in "".join(each.cmdline()))
                killed.kill()
    finally:
        ray.shutdown()
    assert killed is not None
    expected = {(int(Path(record.source).stem), record.query): record for record in whole}
    keys = [(int(Path(record.source).stem), record.query) for record in found]
    assert len(keys) == len({*keys}) == 1200
    for (number, query), record in zip(keys, found, strict=True):
        assert record == replace(expected[number % 60, query], source=record.source)
