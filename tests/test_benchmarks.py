"""The benchmarks' arguments, and that the correctness gate lets equal answers through and no others."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch

from benchmarks import equivalence, plot
from benchmarks.common import count, counts, size
from tests.conftest import ROOT


def test_numbers_of_the_command_line():
    assert (count("8"), counts("1,8,32"), size("448x336")) == (8, [1, 8, 32], (448, 336))


@pytest.mark.parametrize(
    ("read", "text"),
    [*((count, text) for text in ("0", "-1", "x", "", "1.5", "²")), (counts, "1,,2"), (counts, "8,0"), (size, "448"),
     (size, "4x4x4"), (size, "0x448")],
)  # fmt: skip
def test_other_numbers_are_refused(read, text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        read(text)


def gate(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["equivalence.py", *arguments])
    code = equivalence.main()
    return code, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_the_gate(monkeypatch, capsys, wrong):
    answer = equivalence.Subject.answer

    def one_wrong(subject, rows, **settings):
        texts = answer(subject, rows, **settings)
        return texts if len(texts) == 1 else [*texts[:-1], texts[-1] + "<box><1><2></box>"]

    if wrong:
        monkeypatch.setattr(equivalence.Subject, "answer", one_wrong)
    image = sorted((ROOT / "demo" / "images").iterdir())[0]
    code, told = gate(monkeypatch, capsys, str(ROOT / "demo" / "checkpoint"), str(image), "--new-tokens", "3")
    assert code == int(wrong)
    assert told.splitlines()[-1] == ("FAIL" if wrong else "PASS")
    assert "A  penalty 1.0   not run (needs --stock)" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo/checkpoint", "no.png"), "image 'no.png': .*there is no such file"),
        (("demo/images", "demo/images/1.png"), "base: .*demo/images lacks config.json"),
        (("demo/checkpoint", "--new-tokens", "0"), "got '0'; expected a whole number of 1 or more"),
    ],
)
def test_what_the_gate_refuses(monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as refused:
        gate(monkeypatch, capsys, *arguments)
    assert refused.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_a_gpu_make_gpu_says_so(monkeypatch, capsys):
    from benchmarks import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_what_make_gpu_measures(monkeypatch, tmp_path, capsys):
    """Its functions at the demo's scale, without a GPU; what it keeps can be drawn."""
    from benchmarks import gpu
    from benchmarks.throughput import Bench

    bench = Bench("tiny", "float32", "cpu")
    # in place of the stock's code: our model answers a row at a time, and takes what the stock's is called with
    bench.stock, bench.where["stock_dtype"] = bench.model, "float32"
    generate = bench.model.generate
    monkeypatch.setattr(bench.model, "generate", lambda **kwargs: generate(**_ours(kwargs)), raising=False)
    size = (56, 56)
    record = gpu.measure(bench, batches=[1, 2], size=size, frames=2, frame_size=size, grid=(8, 8), new_tokens=18)
    assert record["first_replay"] is None  # nothing is captured here
    assert [run["rows"] for run in record["throughput"]] == [1, 2]
    for run in record["throughput"]:
        assert run["tokens_per_forward"] > 1
        assert 0 < run["product_share"] < 1
        assert min(run["stock_speedup"], run["floor_ms"], run["step_ms"], run["eager_step_ms"]) > 0
    assert record["film"]["failed"] == 0
    assert record["film"]["frames_per_second"] > 0
    assert record["vision"]["patches"] == 64
    (tmp_path / "gpu-x.json").write_text(json.dumps(record))
    plot.main(tmp_path / "gpu-x.json")
    drawn = (tmp_path / "gpu-x.svg").read_text()
    assert "2 images, one question" in drawn
    assert "of the product rate" in capsys.readouterr().out


def _ours(kwargs: dict) -> dict:
    return {name: value for name, value in kwargs.items() if name not in ("tokenizer", "use_cache")}
