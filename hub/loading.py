# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""A model and its processor from a folder or a hub id, with this project's code, on the device at hand."""

import hashlib
import os
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
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Load a model, ready to answer, and its processor.

    Args:
        model: folder or hub id, with this project's code or the official's.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: "auto" for the checkpoint's own, or the name of a torch dtype.
        attn_implementation: transformers' argument.

    Returns:
        The model on its device, in eval mode, and the processor.

    Raises:
        ModelError: there is no such model, it does not load, or there is no such device.
    """
    # Here and not above: --help and usage errors need not wait for torch
    import torch
    from transformers import AutoModel, AutoProcessor

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device: got {device!r}, but torch sees no CUDA device here")
    folder = _folder(model)
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {model} has no processor that loads: {error}") from error
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    try:
        loaded = AutoModel.from_pretrained(folder, trust_remote_code=True, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {model} does not load: {error}") from error
    return loaded.to(device).eval(), processor


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
