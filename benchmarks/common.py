"""What the benchmarks share: models with random weights, stage timers, memory and bandwidth."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import subprocess
import sys
import threading
import time
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "checkpoint"
TINY = ROOT / "tests" / "goldens" / "shapes" / "checkpoint"


def count(text: str) -> int:
    """An argument that is a whole number of 1 or more."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of 1 or more")
    return int(text)


def counts(text: str, between: str = ",") -> list[int]:
    """An argument like 1,8,32."""
    return [count(part) for part in text.split(between)]


def size(text: str) -> tuple[int, int]:
    """An argument like 448x448."""
    sides = counts(text, "x")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected WIDTHxHEIGHT")
    return sides[0], sides[1]


def import_drop_in() -> Any:
    """The clone's remote-code files as a package, without assembling a folder."""
    package = types.ModuleType("locateanything")
    package.__path__ = [str(ROOT)]
    sys.modules.setdefault("locateanything", package)
    import locateanything.modeling_locateanything_batched as modeling

    return modeling


def config_of(scale: str, layers: list[int] | None = None) -> Any:
    """tiny: the shape of a checkpoint of the goldens. full: the 3B model's. mid: in between, for a quick look.

    layers: of the decoder and of the vision tower, if not all.
    """
    from locateanything.configuration import LocateAnythingConfig

    config = LocateAnythingConfig.from_pretrained(TINY) if scale == "tiny" else LocateAnythingConfig()
    if scale == "mid":
        for name, value in {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}.items():
            setattr(config.text_config, name, value)
        config.text_config.num_attention_heads = 6
        config.text_config.layer_types = ["full_attention"] * 12
        config.vision_config.num_hidden_layers = 8
    if layers:
        config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = layers
        config.text_config.layer_types = ["full_attention"] * layers[0]
    return config


def fill_randomly(model: torch.nn.Module) -> None:
    """Weights of a size that keeps activations finite; norms start at one."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator) * 0.02
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            if ("norm" in name and name.endswith("weight")) or name == "mlp1.0.weight":
                flat.fill_(1)
                continue
            for start in range(0, flat.numel(), noise.numel()):
                part = flat[start : start + noise.numel()]
                part.copy_(noise[: part.numel()])


@contextlib.contextmanager
def without_init(dtype: torch.dtype):
    """Builds modules without spending time on values that are overwritten."""
    # 4.57 and 5.x keep it in different places
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            yield
    finally:
        torch.set_default_dtype(default)


def random_model(scale: str, dtype: torch.dtype, device: str, layers: list[int] | None = None) -> Any:
    modeling = import_drop_in()
    with without_init(dtype):
        model = modeling.LocateAnythingBatchedForConditionalGeneration(config_of(scale, layers))
    model.tie_weights()
    fill_randomly(model)
    return model.to(device).eval()


_clock = [time.perf_counter]


def now() -> float:
    return _clock[0]()


def count_cpu_seconds() -> None:
    """From here on seconds are those that a CPU worked for this process, on one thread: other work may run beside."""
    torch.set_num_threads(1)
    _clock[0] = time.process_time


class Stages:
    """Seconds and calls of a model's stages, by replacing the methods that the loop calls."""

    def __init__(self, model: Any):
        from locateanything.kv_cache import PrefillStep

        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.device = model.device
        decode = model.decode

        def staged_decode(embeddings, step, cache):
            name = "prefill" if isinstance(step, PrefillStep) else "decode"
            return self.timed(name, decode, embeddings, step, cache)

        model.decode = staged_decode
        extract, project = model.extract_feature, model.project
        model.extract_feature = lambda *args: self.timed("vision", extract, *args)
        model.project = lambda *args: self.timed("vision", project, *args)

    def timed(self, name, function, *args):
        synchronize(self.device)
        start = now()
        result = function(*args)
        synchronize(self.device)
        self.seconds[name] += now() - start
        self.calls[name] += 1
        return result

    def reset(self) -> None:
        self.seconds.clear()
        self.calls.clear()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak bytes above those at the start: `with PeakMemory(device) as peak: …; peak.bytes`."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        self.start, self.peak, self.running = resident(), 0, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.01)

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.start
        else:
            self.running = False
            self.thread.join()
            self.bytes = self.peak - self.start


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large read reaches, the best of five."""
    data = torch.ones(1 << 28 if device.type == "cuda" else 1 << 27, device=device)
    best = 0.0
    for _ in range(5):
        synchronize(device)
        start = now()
        data.sum()
        synchronize(device)
        best = max(best, data.numel() * 4 / (now() - start))
    return best


def decoder_bytes(model: Any) -> int:
    """What a decode step reads at least: the decoder's layers and the head, once."""
    weights = [*model.language_model.model.layers.parameters(), model.get_output_embeddings().weight]
    # torchao's int8 tensors tell the dtype that they stand for
    return sum(p.numel() * (1 if is_traceable_wrapper_subclass(p) else p.element_size()) for p in weights)


def environment(device: torch.device) -> dict[str, str]:
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip()}, {len(names)} cores" if names else platform.processor()


def print_json(record: dict[str, Any], path: str | None) -> None:
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
