# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""A model and its processor from a folder or a hub id, with this project's code, on the device at hand."""

import hashlib
import math
import os
import sys
import time
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.constants import HF_HOME

from hub.assembly import assemble, open_base, remote_code_files
from hub.errors import HubError, explain


class ModelError(RuntimeError):
    """The model cannot be loaded."""


def load(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Load a model, ready to answer, and its processor.

    Args:
        model: folder or hub id, with this project's code or the official's.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: the name of a torch dtype, or "auto": the checkpoint's own, but float32 on a CPU whose products are
            faster in it, where memory holds it. A line on stderr says so.
        quantize: "int8" for int8 products on a CPU, by torchao: weights per channel, activations per token, so that
            no row's answer depends on its neighbours.
        attn_implementation: transformers' argument.

    Returns:
        The model on its device, in eval mode, and the processor.

    Raises:
        ModelError: there is no such model, it does not load, or there is no such device; "int8" without torchao or
            on another device than the CPU.
    """
    # Here and not above: --help and usage errors need not wait for torch
    import torch
    from transformers import AutoModel

    if device == "auto":
        device = "cpu" if quantize or not torch.cuda.is_available() else "cuda"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device: got {device!r}, but torch sees no CUDA device here")
    processor = load_processor(model)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    chosen = device == "cpu" and dtype == "auto"
    if quantize is not None:
        options["quantization_config"] = _int8(quantize, device)
        if chosen and _float32_is_faster(torch.bfloat16):
            options["dtype"] = torch.float32
    try:
        loaded = AutoModel.from_pretrained(_folder(model), trust_remote_code=True, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {model} does not load: {error}") from error
    if quantize is not None:
        from torchao.quantization import quantize_

        # transformers leaves a head out that shares the embedding's weight
        head = loaded.get_output_embeddings()
        quantize_(head, options["quantization_config"].quant_type)
    elif chosen and loaded.dtype != torch.float32 and _float32_is_faster(loaded.dtype):
        _widen(loaded)
    return loaded.to(device).eval(), processor


def load_processor(model: str) -> Any:
    """The processor alone, which needs no device.

    Raises:
        ModelError: as of `load`.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(_folder(model), trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {model} has no processor that loads: {error}") from error


def load_class(model: str) -> Any:
    """The class that a model will be of, by its config.json."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = AutoConfig.from_pretrained(_folder(model), trust_remote_code=True)
    return get_class_from_dynamic_module(config.auto_map["AutoModel"], _folder(model))


def _int8(quantize: str, device: str) -> Any:
    from transformers import TorchAoConfig

    if quantize != "int8":
        raise ModelError(f"quantize: got {quantize!r}, expected 'int8'")
    if device != "cpu":
        raise ModelError(f"quantize: 'int8' is for the CPU, got the device {device!r}")
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    except ImportError as error:
        raise ModelError(f"quantize: 'int8' needs torchao (`pip install --group int8`): {error}") from error
    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


def _float32_is_faster(dtype: Any) -> bool:
    """Whether this CPU multiplies faster in float32: measured, as instruction sets do not tell (AVX-512's bfloat16 is
    four times as fast as float32 on one CPU, and no faster on another)."""
    import torch

    seconds = {dtype: math.inf, torch.float32: math.inf}
    for _ in range(4):  # the least of each, as other work may run
        for kind in seconds:
            tokens, weight = torch.ones(128, 2048, dtype=kind), torch.ones(2048, 2048, dtype=kind)
            start = time.perf_counter()
            torch.nn.functional.linear(tokens, weight)
            seconds[kind] = min(seconds[kind], time.perf_counter() - start)
    return seconds[torch.float32] < seconds[dtype]


def _widen(model: Any) -> None:
    """Turn a model in half precision to float32 where memory holds it, and say which it is."""
    import psutil

    own, more = str(model.dtype).removeprefix("torch."), model.get_memory_footprint()
    free = psutil.virtual_memory().available
    if free > 1.2 * more:
        model.float()
        print(f"dtype: float32, in which this CPU is faster than in {own}", file=sys.stderr)
    else:
        print(
            f"dtype: {own}; float32 would be faster, but takes {more / 1e9:.0f} GB more; {free / 1e9:.0f} are free",
            file=sys.stderr,
        )


def _folder(model: str) -> str:
    try:
        return loadable(model)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        raise ModelError(line) from error


def loadable(model: str) -> str:
    """A name that `from_pretrained` loads with this project's code.

    Args:
        model: folder or hub id. One whose config.json names other code is assembled into a folder of the user's
            Hugging Face cache, once for each state of the base and of the code.

    Returns:
        `model` itself, or the assembled folder.

    Raises:
        HubError, OSError, …: there is no such model, or it is not LocateAnything, or the hub does not give it.
    """
    if open_base(model, download=False).is_drop_in:
        return model
    base = open_base(model)
    digest = hashlib.sha256(str(base.folder).encode())
    for name in base.sizes:
        state = (base.folder / name).stat()
        digest.update(f"{name} {state.st_size} {state.st_mtime_ns}".encode())
    for path in remote_code_files():
        digest.update(path.read_bytes())
    name = PurePosixPath(model.replace(os.sep, "/")).name
    target = Path(HF_HOME) / "locateanything-batched" / f"{name}-{digest.hexdigest()[:16]}"
    if not target.is_dir():
        try:
            assemble(base.folder, target)
        except (HubError, OSError):
            # Another process may have built the same folder meanwhile
            if not (target / "config.json").is_file():
                raise
    return str(target)
