"""What there is to measure on a GPU, in one go: `make gpu` writes benchmarks/gpu-NAME.json, which plot.py draws.

    python benchmarks/gpu.py [--stock STOCK_DIR] [--name h100]

The GPU tests; throughput at 1, 8, 32 and 64 rows of 1024×768 with 20 boxes each, beside the stock's loop where its
folder is given (transformers 4.57 then), with graphs and without, a step beside its floor; frames of 1280×720 with two
questions each, as liuwang97's 49,016; the vision tower's memory at its largest image; start-up to the first replayed
step. Random bfloat16 weights at the 3B shape. Ten minutes at most.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT
from throughput import Bench, preprocess, synchronize, tell
from vision_memory import peak_of

SEED_FRAMES = 49_016
QUESTIONS = ("Locate all the instances that matches the following description: car.", "Point to: person.")


def gpu_tests() -> dict[str, Any]:
    """How many GPU tests passed, failed and were skipped."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    return {**counts, "exit_code": done.returncode, "seconds": time.perf_counter() - start}


def first_replay(bench: Bench, size: tuple[int, int], mode: str) -> float | None:
    """Seconds from a model's first call of generate to its first replayed step; None where nothing is captured."""
    from locateanything import cuda_graphs

    capture, replayed = cuda_graphs.capture_graph, []

    def watched(*args):
        replay, result = capture(*args)

        def timed_replay():
            replay()
            if not replayed:
                synchronize(bench.device)
                replayed.append(time.perf_counter())

        return timed_replay, result

    cuda_graphs.capture_graph = watched
    start = time.perf_counter()
    try:
        bench.run("images", 1, 120, size, mode, baseline_rows=0)
    finally:
        cuda_graphs.capture_graph = capture
        cuda_graphs.release(bench.model)  # graphs that tell of themselves
    return replayed[0] - start if replayed else None


def frames_of(bench: Bench, frames: int, size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """A processor's row for each question on each frame."""
    noise = np.random.default_rng(0)
    for _ in range(frames):
        frame = Image.fromarray(noise.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        for question in QUESTIONS:
            yield preprocess(bench.processor, [frame], [question], bench.model)


def film(bench: Bench, frames: int, size: tuple[int, int], mode: str) -> dict[str, Any]:
    """Two questions on each frame, preprocessed, queued and answered as the scanner does."""
    start = time.perf_counter()
    outputs = bench.model.generate_batch(
        frames_of(bench, frames, size), stream=True, generation_mode=mode, max_new_tokens=32
    )
    failed = sum(output.error is not None for output in outputs)
    seconds = time.perf_counter() - start
    return {
        "frames": frames, "size": "x".join(map(str, size)), "new_tokens": 32, "failed": failed, "seconds": seconds,
        "frames_per_second": frames / seconds, "seconds_for_the_seeds": SEED_FRAMES / frames * seconds,
    }  # fmt: skip


def measure(
    bench: Bench, *, batches: list[int], size: tuple[int, int], frames: int, frame_size: tuple[int, int],
    grid: tuple[int, int], mode: str = "fast", new_tokens: int = 120,
) -> dict[str, Any]:  # fmt: skip
    """All but the tests. grid: patches of the largest picture; new_tokens: six a box."""
    record: dict[str, Any] = {"first_replay": first_replay(bench, size, mode), "throughput": []}
    for batch in batches:
        run = ("images", batch, new_tokens, size, mode)
        eager = bench.run(*run, baseline_rows=0, decode_graphs=False)
        record["throughput"].append({**bench.run(*run), "eager_step_ms": eager["step_ms"]})
        tell(record["throughput"][-1])
        print(f"  without graphs a step takes {eager['step_ms']:.2f} ms")
    record["film"] = film(bench, frames, frame_size, mode)
    layers = bench.model.config.vision_config.num_hidden_layers
    peak, seconds = peak_of(grid, layers, bench.model.dtype, bench.device)
    record["vision"] = {"patches": grid[0] * grid[1], "peak_bytes": peak, "seconds": seconds}
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock", metavar="DIR", help="a folder with the stock's config and code")
    parser.add_argument("--name", help="of the machine, in the file's name (the GPU's)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device here, and there is nothing else to measure", file=sys.stderr)
        return 1
    start = time.perf_counter()
    tests = gpu_tests()
    print(f"GPU tests: {tests}")
    bench = Bench("full", "bfloat16", "cuda", stock=arguments.stock, stock_dtype="bfloat16")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    record = {
        **bench.where, "driver": " ".join(driver[:1]), "cuda": torch.version.cuda,
        "read": bench.read, "product_rate": bench.rate, "tests": tests,
        **measure(
            bench, batches=[1, 8, 32, 64], size=(1024, 768), frames=300, frame_size=(1280, 720), grid=(160, 160)
        ),
    }  # fmt: skip
    record["seconds"] = time.perf_counter() - start
    name = arguments.name or re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    path = ROOT / "benchmarks" / f"gpu-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"first replayed step after {record['first_replay']} s; {record['film']}; {record['vision']}\n{path}")
    return 1 if tests["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
