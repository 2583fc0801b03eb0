"""Throughput of generate, stage by stage, against a loop over single rows (and against the stock model's).

    python benchmarks/throughput.py --scale full --batch 8 --new-tokens 64
    python benchmarks/throughput.py --scale full --batch 8 --workload questions --stock STOCK_DIR   # transformers 4.57

Weights are random, at the real 3B shape (`full`) or smaller; images are noise, preprocessed for real. Random weights
answer nonsense, but in `fast` mode six tokens a window, as boxes do: "boxes" below are six new tokens each.
STOCK_DIR is a folder with the stock's config and code; its model shares the very parameters of ours.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import (
    DEMO,
    PeakMemory,
    Stages,
    bandwidth,
    config_of,
    count,
    counts,
    decoder_bytes,
    environment,
    print_json,
    random_model,
    size,
    synchronize,
    without_init,
)

WORKLOADS = {
    "images": "many images, one question",
    "questions": "one image, many questions",
    "long": "many images, answers four times as long",
    "ragged": "many images, answers of 1/8 to 2 times the length",
}


def rows_of(workload: str, rows: int, size: tuple[int, int], new_tokens: int) -> tuple[list, list[str], list[int]]:
    """Images, questions and limits of each row."""
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(rows)]
    questions = ["Locate all the instances that match the following description: red circle."] * rows
    limits = [new_tokens] * rows
    if workload == "questions":
        images = images[:1] * rows
        questions = [f"Locate all the instances that match the following description: thing {i}." for i in range(rows)]
    elif workload == "long":
        limits = [4 * new_tokens] * rows
    elif workload == "ragged":
        draw = random.Random(0)
        limits = [draw.randint(max(1, new_tokens // 8), 2 * new_tokens) for _ in range(rows)]
    return images, questions, limits


def preprocess(processor: Any, images: list, questions: list[str], model: Any) -> dict[str, Any]:
    """The processor's batch; the demo tokenizer's ids, with the image slots that the model's config names."""
    inputs = processor.apply_chat_template(
        [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
            for image, question in zip(images, questions, strict=True)
        ],
        add_generation_prompt=True,
        tokenize=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    slot = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    inputs["input_ids"][inputs["input_ids"] == slot] = model.config.image_token_index
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {name: value.to(model.device) for name, value in inputs.items()}


def stock_model(folder: str, ours: Any, scale: str) -> Any:
    """The stock's own class over the very parameters of ours."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    shape = config_of(scale)
    for name in ("text_config", "vision_config"):
        target, source = getattr(config, name), getattr(shape, name)
        for key, value in source.to_dict().items():
            if hasattr(target, key) and key not in ("auto_map", "architectures", "model_type"):
                setattr(target, key, value)
    for key, value in vars(shape).items():
        if key.endswith("_token_id") or key == "image_token_index":
            setattr(config, key, value)
    with without_init(ours.dtype):
        model = AutoModel.from_config(config, trust_remote_code=True)
    model.load_state_dict(ours.state_dict(), assign=True)
    model.tie_weights()
    return model.to(ours.device).eval()


class LengthOnly:
    """All that the stock's generate asks of a tokenizer."""

    model_max_length = 16384

    def decode(self, ids, **kwargs):
        return " ".join(map(str, ids if isinstance(ids, list) else torch.as_tensor(ids).flatten().tolist()))

    def batch_decode(self, rows, **kwargs):
        return [self.decode(row) for row in rows]


def one_row(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    kept = inputs["attention_mask"][row].bool()
    sizes = inputs["image_grid_hws"].prod(1).tolist()
    start = sum(sizes[:row])
    return {
        "input_ids": inputs["input_ids"][row : row + 1, kept],
        "attention_mask": inputs["attention_mask"][row : row + 1, kept],
        "pixel_values": inputs["pixel_values"][start : start + sizes[row]],
        "image_grid_hws": inputs["image_grid_hws"][row : row + 1],
    }


def timed(function, device, repeats: int) -> tuple[float, Any]:
    seconds, result = [], None
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        result = function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("tiny", "mid", "full"), default="tiny")
    parser.add_argument("--batch", type=counts, default=[1, 8], help="rows of the batches, e.g. 1,8,32")
    parser.add_argument("--workload", choices=(*WORKLOADS, "all"), default="all")
    parser.add_argument("--new-tokens", type=count, default=64)
    parser.add_argument("--size", type=size, default=(448, 448), help="width x height of the images, in pixels")
    parser.add_argument("--mode", choices=("hybrid", "fast", "slow", "verified"), default="fast")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=count, default=1, help="the median of so many runs")
    parser.add_argument("--baseline-rows", type=count, default=2, help="rows of the single-row loops, scaled up")
    parser.add_argument("--stock", metavar="DIR", help="a folder with the stock's config and code")
    parser.add_argument("--json", metavar="FILE", help="append one line per result")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    model = random_model(arguments.scale, getattr(torch, arguments.dtype), arguments.device)
    stages = Stages(model)
    from transformers import Qwen2TokenizerFast

    from locateanything.processing import LocateAnythingImageProcessor, LocateAnythingProcessor

    processor = LocateAnythingProcessor(
        LocateAnythingImageProcessor.from_pretrained(DEMO), Qwen2TokenizerFast.from_pretrained(DEMO)
    )
    stock = stock_model(arguments.stock, model, arguments.scale) if arguments.stock else None
    where = environment(device)
    speed = bandwidth(device)
    floor = decoder_bytes(model) / speed
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"reads {speed / 1e9:.1f} GB/s; floor of a decode step (weights once): {floor * 1e3:.1f} ms")

    size_name = "x".join(map(str, arguments.size))
    for workload in WORKLOADS if arguments.workload == "all" else [arguments.workload]:
        for batch in arguments.batch:
            images, questions, limits = rows_of(workload, batch, arguments.size, arguments.new_tokens)
            prepare = partial(preprocess, processor, images, questions, model)
            prepare_seconds, inputs = timed(prepare, device, 1)
            settings = {"generation_mode": arguments.mode, "return_dict_in_generate": True}

            def ours(inputs=inputs, limits=limits, settings=settings):
                stages.reset()
                return model.generate(**inputs, max_new_tokens=limits, max_batch_rows=len(limits), **settings)

            with PeakMemory(device) as peak:
                seconds, output = timed(ours, device, arguments.repeats)
            measured, calls = dict(stages.seconds), dict(stages.calls)
            new = (output.sequences[:, inputs["input_ids"].shape[1] :] != model.config.pad_token_id).sum().item()
            forwards = int(output.row_forwards.sum())
            # rows alike stand for each other; ragged ones do not
            single = list(range(batch if workload == "ragged" else min(arguments.baseline_rows, batch)))

            def loop(inputs=inputs, limits=limits, settings=settings, single=single):
                for row in single:
                    model.generate(**one_row(inputs, row), max_new_tokens=limits[row], **settings)

            def stock_loop(inputs=inputs, limits=limits, single=single):
                for row in single:
                    with torch.no_grad():
                        stock.generate(
                            **one_row(inputs, row), tokenizer=LengthOnly(), max_new_tokens=limits[row],
                            generation_mode=arguments.mode, use_cache=True,
                        )  # fmt: skip

            record = {
                **where, "scale": arguments.scale, "dtype": arguments.dtype, "mode": arguments.mode,
                "workload": workload, "rows": batch, "new_tokens": arguments.new_tokens, "size": size_name,
                "seconds": seconds, "preprocess": prepare_seconds, **measured, "rows_per_second": batch / seconds,
                "boxes_per_second": new / 6 / seconds, "forwards": forwards, "tokens_per_forward": new / forwards,
                "steps": calls["decode"], "step_ms": 1e3 * measured["decode"] / calls["decode"],
                "floor_ms": 1e3 * floor, "peak_bytes": peak.bytes,
            }  # fmt: skip
            share = len(single) / batch
            if batch > 1:
                record["loop_speedup"] = timed(loop, device, 1)[0] / share / seconds
            if stock is not None:
                record["stock_speedup"] = timed(stock_loop, device, 1)[0] / share / seconds
            print_json(record, arguments.json)
            print(f"\n{WORKLOADS[workload]}: {batch} rows, {arguments.new_tokens} new tokens, {size_name}")
            parts = {"preprocess": prepare_seconds, **measured}
            parts["rest"] = seconds - sum(measured.values())
            print("  " + "  ".join(f"{name} {part:.2f} s" for name, part in parts.items()))
            print(
                f"  {record['rows_per_second']:.3f} rows/s  {record['boxes_per_second']:.2f} boxes/s  "
                f"{forwards} forwards  {record['tokens_per_forward']:.2f} tokens/forward  "
                f"peak +{peak.bytes / 1e9:.2f} GB  "
                f"step {record['step_ms']:.1f} ms = {record['step_ms'] / record['floor_ms']:.1f} × floor"
            )
            for name in ("loop", "stock"):
                if f"{name}_speedup" in record:
                    what = "single-row" if name == "loop" else "stock"
                    print(f"  {record[f'{name}_speedup']:.2f} × the {what} loop")


if __name__ == "__main__":
    main()
