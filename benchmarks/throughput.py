"""Throughput of generate, stage by stage, against a loop over single rows (and against the stock model's).

    python benchmarks/throughput.py --scale full --batch 8 --new-tokens 64
    python benchmarks/throughput.py --scale full --batch 8 --workload questions --stock STOCK_DIR   # transformers 4.57
    python benchmarks/throughput.py --scale full --layers 12,6 --dtype bfloat16 --quantize int8 --switches

Weights are random, at the real 3B shape (`full`) or smaller; images are noise, preprocessed for real. Random weights
answer nonsense, but in `fast` mode six tokens a window, as boxes do: "boxes" below are six new tokens each.
STOCK_DIR is a folder with the stock's config and code; its model has the very parameters of ours, in --stock-dtype.
The product rate is the best that the decoder's own matrices reach here; its share counts products and attention.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import (
    DEMO,
    PeakMemory,
    Stages,
    bandwidth,
    config_of,
    count,
    count_cpu_seconds,
    counts,
    decoder_bytes,
    environment,
    now,
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


def stock_model(folder: str, ours: Any, scale: str, layers: list[int] | None = None) -> Any:
    """The stock's own class over the very parameters of ours."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    shape = config_of(scale, layers)
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
        start = now()
        result = function()
        synchronize(device)
        seconds.append(now() - start)
    return median(seconds), result


class Products(TorchFunctionMode):
    """Counts the arithmetic operations of linear layers and attention: `with Products() as products: …`."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            self.operations += 2 * args[0].numel() * args[1].shape[0]
        elif function is F.scaled_dot_product_attention:
            self.operations += 4 * args[0].numel() * args[1].shape[-2]
        return function(*args, **(kwargs or {}))


def product_rate(model: Any) -> float:
    """Operations a second of the decoder's widest product, the best of several token counts."""
    linear = model.language_model.model.layers[0].mlp.up_proj
    best = 0.0
    with torch.no_grad():
        for tokens in (96, 304, 1024, 4096 if model.device.type == "cuda" else 1024):
            hidden = torch.randn(tokens, linear.in_features, device=model.device).to(model.dtype)
            linear(hidden)
            seconds = min(timed(partial(linear, hidden), model.device, 1)[0] for _ in range(5))
            best = max(best, 2 * hidden.numel() * linear.out_features / seconds)
    return best


SWITCHES: dict[str, dict[str, Any]] = {
    "batches": {"max_batch_rows": 1},
    "share_images": {"share_images": False},
    "share_prefixes": {"share_prefixes": False},
    "decode_graphs": {"decode_graphs": False},
}
ON_CUDA = {"decode_graphs"}


class Bench:
    """A model with random weights, in the form that is measured, and the stock's with the same in its own.

    Args:
        scale, layers: shape; see `config_of`.
        dtype, stock_dtype: names of torch dtypes.
        quantize: "int8" or None.
        stock: a folder with the stock's config and code, or None.
    """

    def __init__(self, scale, dtype, device, *, layers=None, quantize=None, stock=None, stock_dtype="float32"):
        from transformers import Qwen2TokenizerFast

        first = stock_dtype if stock else dtype
        self.model = random_model(scale, getattr(torch, first), device, layers)
        from locateanything.processing import LocateAnythingImageProcessor, LocateAnythingProcessor

        self.stock = stock_model(stock, self.model, scale, layers) if stock else None
        self.model.to(getattr(torch, dtype))  # the stock's parameters stay as they are
        if quantize:
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(self.model, Int8DynamicActivationInt8WeightConfig())  # as hub/loading.py: the head too
        self.device, self.stages = self.model.device, Stages(self.model)
        self.processor = LocateAnythingProcessor(
            LocateAnythingImageProcessor.from_pretrained(DEMO), Qwen2TokenizerFast.from_pretrained(DEMO)
        )
        self.read = bandwidth(self.device)
        self.rate = product_rate(self.model)
        shape = f"{scale} {layers}" if layers else scale
        self.where = {**environment(self.device), "scale": shape, "dtype": dtype, "quantize": quantize}
        if stock:
            self.where["stock_dtype"] = stock_dtype

    def floor(self, rows: int) -> float:
        """Seconds that a step of `fast` takes at least: its weights read once, or its operations at the product rate.

        A row feeds twelve tokens, and the head six of them.
        """
        layers = sum(weight.numel() for weight in self.model.language_model.model.layers.parameters())
        operations = 2 * rows * (12 * layers + 6 * self.model.get_output_embeddings().weight.numel())
        return max(decoder_bytes(self.model) / self.read, operations / self.rate)

    def run(
        self, workload: str, batch: int, new_tokens: int, size: tuple[int, int], mode: str,
        *, repeats: int = 1, baseline_rows: int = 2, **switches: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """One workload: its record. baseline_rows: of the single-row loops, scaled up; 0 leaves them out."""
        model, stages, device = self.model, self.stages, self.device
        images, questions, limits = rows_of(workload, batch, size, new_tokens)
        prepare = partial(preprocess, self.processor, images, questions, model)
        prepare_seconds, inputs = timed(prepare, device, 1)
        settings = {"generation_mode": mode, "return_dict_in_generate": True}

        def ours():
            stages.reset()
            return model.generate(**inputs, **{"max_batch_rows": batch, **settings, **switches}, max_new_tokens=limits)

        products = Products()
        # what is compiled would have the counting compiled as well
        with contextlib.nullcontext() if switches.get("compile") else products:
            if device.type == "cuda":
                ours()  # libraries set themselves up, and graphs are captured
                ours()
                products.operations //= 2
            else:
                with PeakMemory(device) as peak:
                    seconds, output = timed(ours, device, repeats)
                products.operations //= repeats
        if device.type == "cuda":
            with PeakMemory(device) as peak:
                seconds, output = timed(ours, device, repeats)
        measured, calls = dict(stages.seconds), dict(stages.calls)
        new = (output.sequences[:, inputs["input_ids"].shape[1] :] != model.config.pad_token_id).sum().item()
        forwards = int(output.row_forwards.sum())
        record = {
            **self.where, "mode": mode, "workload": workload, "rows": batch, "new_tokens": new_tokens,
            "size": "x".join(map(str, size)), "switches": switches, "seconds": seconds,
            "preprocess": prepare_seconds, **measured, "rows_per_second": batch / seconds,
            "boxes_per_second": new / 6 / seconds, "forwards": forwards, "tokens_per_forward": new / forwards,
            "steps": calls["decode"], "step_ms": 1e3 * measured["decode"] / calls["decode"],
            "floor_ms": 1e3 * self.floor(batch), "peak_bytes": peak.bytes,
            "product_rate": self.rate, "product_share": products.operations / seconds / self.rate,
        }  # fmt: skip
        # rows alike stand for each other; ragged ones do not
        single = list(range(batch if workload == "ragged" else min(baseline_rows, batch)))

        def loop():
            for row in single:
                model.generate(**one_row(inputs, row), max_new_tokens=limits[row], **settings)

        def stock_loop():
            for row in single:
                fed = one_row(inputs, row)
                with torch.no_grad():
                    self.stock.generate(
                        **{**fed, "pixel_values": fed["pixel_values"].to(self.stock.dtype)}, tokenizer=LengthOnly(),
                        max_new_tokens=limits[row], generation_mode=mode, use_cache=True,
                    )  # fmt: skip

        share = len(single) / batch
        if single and batch > 1:
            record["loop_speedup"] = timed(loop, device, 1)[0] / share / seconds
        if single and self.stock is not None:
            record["stock_speedup"] = timed(stock_loop, device, 1)[0] / share / seconds
        return record


def tell(record: dict[str, Any]) -> None:
    """A record, for people."""
    print(f"\n{WORKLOADS[record['workload']]}: {record['rows']} rows, {record['new_tokens']} new tokens, "
          f"{record['size']}")  # fmt: skip
    parts = {name: record[name] for name in ("preprocess", "vision", "prefill", "decode")}
    parts["rest"] = record["seconds"] + parts["preprocess"] - sum(parts.values())
    print("  " + "  ".join(f"{name} {part:.2f} s" for name, part in parts.items()))
    print(
        f"  {record['rows_per_second']:.3f} rows/s  {record['boxes_per_second']:.2f} boxes/s  "
        f"{record['forwards']} forwards  {record['tokens_per_forward']:.2f} tokens/forward  "
        f"peak +{record['peak_bytes'] / 1e9:.2f} GB  "
        f"step {record['step_ms']:.1f} ms = {record['step_ms'] / record['floor_ms']:.1f} × floor  "
        f"{record['product_share']:.0%} of the product rate"
    )
    for name, what in (("loop", "single-row"), ("stock", f"stock {record.get('stock_dtype')}")):
        if f"{name}_speedup" in record:
            print(f"  {record[f'{name}_speedup']:.2f} × the {what} loop")


def tell_switches(bench: Bench, keep: Callable[[dict[str, Any]], None], *run: Any) -> None:
    """What each switch brings: with all off, each alone, all but it, and all on."""
    switches = {
        name: switch for name, switch in SWITCHES.items() if name not in ON_CUDA or bench.device.type == "cuda"
    }
    off = {name: value for switch in switches.values() for name, value in switch.items()}
    cases = {"all off": off}
    for name, switch in switches.items():
        cases[f"{name} alone"] = {key: value for key, value in off.items() if key not in switch}
        cases[f"all but {name}"] = switch
    cases |= {"all on": {}, "all on, compiled": {"compile": True}}  # the last, as layers stay compiled
    seconds = {}
    for case, chosen in cases.items():
        if "compile" in chosen:
            bench.run(*run, baseline_rows=0, **chosen)
        record = bench.run(*run, baseline_rows=0, **chosen)
        keep(record)
        seconds[case] = record["seconds"]
        print(f"  {case:25} {record['seconds']:8.2f} s  {seconds['all off'] / record['seconds']:.2f} × all off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda, dtypes = torch.cuda.is_available(), ("float32", "bfloat16", "float16")
    parser.add_argument("--scale", choices=("tiny", "mid", "full"), default="tiny")
    parser.add_argument("--layers", type=counts, metavar="N,N", help="fewer: of the decoder and of the vision tower")
    parser.add_argument("--batch", type=counts, default=[1, 8], help="rows of the batches, e.g. 1,8,32")
    parser.add_argument("--workload", choices=(*WORKLOADS, "all"), default="all")
    parser.add_argument("--new-tokens", type=count, default=64)
    parser.add_argument("--size", type=size, default=(448, 448), help="width x height of the images, in pixels")
    parser.add_argument("--mode", choices=("hybrid", "fast", "slow", "verified"), default="fast")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16" if cuda else "float32")
    parser.add_argument("--quantize", choices=("int8",), help="int8 products, on a CPU")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--repeats", type=count, default=1, help="the median of so many runs")
    parser.add_argument("--baseline-rows", type=count, default=2, help="rows of the single-row loops, scaled up")
    parser.add_argument("--stock", metavar="DIR", help="a folder with the stock's config and code")
    parser.add_argument("--stock-dtype", choices=dtypes, default="bfloat16" if cuda else "float32")
    parser.add_argument("--switches", action="store_true", help="instead: what each of generate's switches brings")
    parser.add_argument("--json", metavar="FILE", help="append one line per result")
    parser.add_argument("--cpu-seconds", action="store_true", help="of one thread, where other work runs beside")
    arguments = parser.parse_args()
    if arguments.cpu_seconds:
        count_cpu_seconds()

    bench = Bench(
        arguments.scale, arguments.dtype, arguments.device, layers=arguments.layers, quantize=arguments.quantize,
        stock=arguments.stock, stock_dtype=arguments.stock_dtype,
    )  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in bench.where.items()))
    print(f"reads {bench.read / 1e9:.1f} GB/s, products {bench.rate / 1e12:.3f} TFLOP/s")
    keep = partial(print_json, path=arguments.json)
    for workload in WORKLOADS if arguments.workload == "all" else [arguments.workload]:
        for batch in arguments.batch:
            run = (workload, batch, arguments.new_tokens, arguments.size, arguments.mode)
            if arguments.switches:
                print(f"\n{WORKLOADS[workload]}: {batch} rows, {arguments.new_tokens} new tokens")
                tell_switches(bench, keep, *run)
                continue
            record = bench.run(*run, repeats=arguments.repeats, baseline_rows=arguments.baseline_rows)
            keep(record)
            tell(record)


if __name__ == "__main__":
    main()
