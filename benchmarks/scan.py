"""A scan beside `generate` on the same rows, and the share of the scan's time in which its engine worked.

    python benchmarks/scan.py --pictures 1200 --rounds 3
    python benchmarks/scan.py --make frames --pictures 49016      # only draws the pictures, for locate.py

Pictures are the demo's scenes, with two queries each. The scan starts at their files and ends with their records, its
model loaded in a process of its own as locate.py does, anew each round; `generate` starts with every row preprocessed
and in memory. Wall time beside other work says little; seconds of CPU are printed too: of the scan without its
engine's process, of that, of `generate`, and of reading and preprocessing. The engine works where it steps and where
it takes rows in beside those it has: it never waits there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose scan.py is not the package
from common import DEMO, count, environment, print_json

from demo.scenes import scenes

QUERIES = ("red circle", "blue square")
DISTINCT = 1200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--pictures", type=count, default=1200)
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--make", metavar="FOLDER", help="draw the pictures into a new folder, and stop")
    parser.add_argument("--engine", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="append the figures to it, a line each")
    args = parser.parse_args()
    if args.make:
        make(Path(args.make), args.pictures)
    elif args.engine:
        engine(args.engine)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    from hub.loading import load

    model, processor = load(args.model, device=args.device)
    gc.freeze()  # as locate.py does
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "pictures", args.pictures)
        rounds = [measured(model, processor, args, folder) for _ in range(args.rounds)]
    print("scan of generate, by round:", *(f"{each['scan_of_generate']:.3f}" for each in rounds))
    figures = {name: round(median(each[name] for each in rounds), 3) for name in rounds[0]}
    print("\n".join(f"{name:>20} {value}" for name, value in figures.items()))
    print_json({"benchmark": "scan", **figures, "rounds": args.rounds, **environment(model.device)}, args.json)


def make(folder: Path, pictures: int) -> None:
    """So many PNGs, of at most `DISTINCT` scenes."""
    folder.mkdir(exist_ok=True)
    for number, scene in enumerate(scenes(min(pictures, DISTINCT))):
        scene.image.save(folder / f"{number}.png")
    for number in range(DISTINCT, pictures):
        os.link(folder / f"{number % DISTINCT}.png", folder / f"{number}.png")


def engine(figures: Path) -> None:
    """The scan's process, which at its end writes how long its engine worked."""
    from hub import engine_process
    from hub.loading import load

    def timed(*given, **loading):
        model, processor = load(*given, **loading)
        package = type(model).__module__.rpartition(".")[0]
        loop = sys.modules[package + ".generation"].GenerationLoop
        manager = sys.modules[package + ".continuous_batching"].ContinuousBatchingManager
        worked, cpu = 0.0, time.process_time()
        step, take, close = loop.step, manager._take, loop.close

        def stepped(self):
            nonlocal worked
            begin = time.perf_counter()
            try:
                return step(self)
            finally:
                worked += time.perf_counter() - begin

        def taken(self, engine):
            nonlocal worked
            begin, busy = time.perf_counter(), engine.busy  # else it may wait
            try:
                return take(self, engine)
            finally:
                worked += busy * (time.perf_counter() - begin)

        def closed(self):
            close(self)
            figures.write_text(json.dumps({"worked": worked, "cpu": time.process_time() - cpu}))

        loop.step, manager._take, loop.close = stepped, taken, closed
        return model, processor

    engine_process.main(timed)


def measured(model, processor, args, folder: str) -> dict[str, float]:
    """One round of each, rows a second and seconds of CPU."""
    from hub.engine_process import EngineProcess, load_apart
    from scan.sources import read_items
    from scan.workers import Interviewer, scan

    figures = Path(folder) / "engine.json"
    EngineProcess.command = (sys.executable, __file__, "--engine", str(figures))
    apart, processor = load_apart(args.model, device=args.device)
    wall, cpu = time.perf_counter(), time.process_time()
    records = list(scan([f"{folder}/pictures"], QUERIES, model=apart, processor=processor))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    told = json.loads(figures.read_text())
    assert {record.status for record in records} == {"ok"}

    prepare_cpu = time.process_time()
    interviewer = Interviewer(processor, QUERIES, "detect", 0.0, "hybrid")
    items = ((item, interviewer.questions(item)) for item in read_items([f"{folder}/pictures"]))
    rows = [one.row for item, questions in items for one in interviewer.prepare(item, questions)]
    prepare_cpu = time.process_time() - prepare_cpu
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    pad = model.generation_config.pad_token_id or model.config.pad_token_id
    inputs = {
        "input_ids": pad_sequence(ids, True, pad, padding_side="left"),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], True, 0, padding_side="left"),
        **{name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "image_grid_hws")},
    }
    begin, begin_cpu = time.perf_counter(), time.process_time()
    model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        stopping_criteria=[model.degenerate_answer_criteria()],
        return_dict_in_generate=True,
        output_scores=True,
    )
    generate, generate_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    return {
        "rows": len(rows),
        "scan_rows_per_s": len(rows) / wall,
        "generate_rows_per_s": len(rows) / generate,
        "scan_of_generate": generate / wall,
        "engine_share": told["worked"] / wall,
        "scan_cpu_s": cpu,
        "scan_engine_cpu_s": told["cpu"],
        "generate_cpu_s": generate_cpu,
        "prepare_cpu_s": prepare_cpu,
    }


if __name__ == "__main__":
    main()
