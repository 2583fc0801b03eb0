# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""A checkpoint's files, examined before a weight is read: safetensors only, whole, of this model and its tokenizer."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PretrainedConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import is_peft_available

from .configuration import LocateAnythingConfig

MAX_HEADER = 100 * 2**20  # bytes, safetensors' own limit
# Bits of an element, by safetensors' names.
DTYPES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
TOKENS = {
    "<IMG_CONTEXT>": "image",
    "<box>": "box_start",
    "</box>": "box_end",
    "<ref>": "ref_start",
    "</ref>": "ref_end",
    "<0>": "coord_start",
    "<1000>": "coord_end",
    "<null>": "null",
    "<text_mask>": "mask",
    "<|im_end|>": "end",
}
FLOATING = frozenset(name for name in DTYPES if name.startswith(("F", "BF")))


class Stored(NamedTuple):
    """A tensor in a file: its dtype, by safetensors' name, and its shape."""

    dtype: str
    shape: list[int]


Header = dict[str, Stored]


class CheckedLoading:
    """A mixin in front of `PreTrainedModel`, whose `from_pretrained` unpickles, and fills in what is missing."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' call; weights come from safetensors, and from a local folder only if it is whole.

        Raises:
            ValueError: `use_safetensors=False`, or a local folder whose files are damaged, do not fit the config or
                its tokenizer, or hold pickle only, or that of an adapter whose base is such a folder. The message
                names the file.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors=False: pickle can run any code and is never loaded; leave it out.")
        own: Any = super()
        given = pretrained_model_name_or_path
        if given is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
            return own.from_pretrained(given, *args, **kwargs)
        folder = _base_of(Path(given) / (kwargs.get("subfolder") or ""))
        if folder.is_dir():
            config = _read_config(folder, kwargs.get("config"))
            _check_generation_config(folder)
            check_tokenizer(folder, config)
            stored = read_header(folder, kwargs.get("variant"))
            with torch.device("meta"):
                model: Any = or_value_error(folder / "config.json", cls, copy.deepcopy(config))
            quantised = kwargs.get("quantization_config") or _quantisation(folder, config)
            if not quantised and not kwargs.get("key_mapping"):
                _check_weights(folder, stored, model, exact=not kwargs.get("ignore_mismatched_sizes"))
        return own.from_pretrained(given, *args, **{**kwargs, "use_safetensors": True})


def _base_of(folder: Path) -> Path:
    """The model's folder: of an adapter's, which transformers loads where peft is installed, that of its base."""
    path = folder / "adapter_config.json"
    if not path.is_file() or not is_peft_available():
        return folder
    base = _read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: its base_model_name_or_path is {base!r}; expected the model that it adapts.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder}: holds no adapter_model.safetensors; pickle is never loaded.")
    return Path(base)


def _check_generation_config(folder: Path) -> None:
    """transformers passes over a damaged one."""
    path = folder / "generation_config.json"
    if path.is_file():
        content = _read_json(path)
        or_value_error(path, GenerationConfig.from_dict, content)


def _read_config(folder: Path, given: Any) -> Any:
    if isinstance(given, PretrainedConfig):  # else a path; 5.x may hand over a class that was loaded twice
        return given
    path = Path(given or folder)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        _read_json(path)
    return or_value_error(path, LocateAnythingConfig.from_pretrained, given or folder)


def or_value_error(what: Path | str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What transformers makes of values that `what` holds.

    Raises:
        ValueError: it fails on one of them, by whatever exception that leads to.
    """
    try:
        return make(*args, **kwargs)
    except (ImportError, OSError, ValueError):  # a package that is missing is no fault of the values
        raise
    except Exception as error:
        raise ValueError(
            f"{what}: has a value that nothing can be made of ({type(error).__name__}: {error})."
        ) from error


def _quantisation(folder: Path, config: Any) -> Any:
    """What `config` says of quantised weights, if anything."""
    told = getattr(config, "quantization_config", None)
    # transformers warns of a method it does not know and loads the numbers as they are
    if isinstance(told, dict) and told and not AutoHfQuantizer.supports_quant_method(told):
        raise ValueError(f"{folder}: its config's quantization_config is {told}, a method that transformers lacks.")
    return told


def read_header(folder: Path, variant: str | None = None) -> Header:
    """Each tensor of a checkpoint by its name, from the headers of its safetensors files.

    Args:
        variant: as in transformers' `from_pretrained`: `model.VARIANT.safetensors`.

    Raises:
        ValueError: no safetensors, a shard that is missing, or a file that is damaged.
    """
    part = f".{variant}" if variant else ""
    single = folder / f"model{part}.safetensors"
    index = folder / f"model.safetensors.index{part}.json"
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
        beside = f"; {', '.join(pickles)} may be pickle, which can run any code and is never loaded" if pickles else ""
        raise ValueError(f"{folder}: holds neither {single.name} nor {index.name}{beside}.")
    content = _read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index}: has no metadata, which transformers asks for.")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: has no weight_map of names to files.")
    tensors: Header = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if os.path.basename(shard) != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: names {shard!r}; expected safetensors files beside it.")
        if not path.is_file():
            raise ValueError(f"{path}: is missing, though {index.name} names it.")
        header = _read_header(path)
        absent = sorted(name for name, file in weight_map.items() if file == shard and name not in header)
        if absent:
            raise ValueError(f"{path}: lacks {_some(absent)}, which {index.name} looks for there.")
        # else it depends on the release of transformers which one is read
        elsewhere = sorted(name for name in header if weight_map.get(name) != shard)
        if elsewhere:
            raise ValueError(f"{path}: holds {_some(elsewhere)}, which {index.name} does not look for there.")
        tensors.update(header)
    return tensors


def check_tokenizer(folder: Path, config: LocateAnythingConfig) -> None:
    """The tokenizer beside a checkpoint gives its tokens the ids that the config names; none there is no error.

    Raises:
        ValueError: ids that differ, tokens that are missing, a file that is no JSON.
    """
    for name in ("vocab.json", "tokenizer.json"):
        if (folder / name).is_file():
            _check_words(folder / name, config)
    # all of them, for which one a tokenizer is made of depends on the release of transformers
    paths = (folder / name for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"))
    named = {path: ids for path in paths if path.is_file() and (ids := _added_tokens(path))}
    known = set().union(*named.values())
    for path, ids in named.items():
        for token, role in TOKENS.items():
            expected, found = getattr(config.token_roles, role), ids.get(token)
            told = token in ids or token not in known or expected in ids.values()
            if told and found != expected:
                raise ValueError(
                    f"{path}: {token} has the id {found}, but the config's {role} is {expected}; "
                    "the tokenizer is another model's."
                )


def _check_words(path: Path, config: LocateAnythingConfig) -> None:
    """The ordinary words: each has its own id, and the one that answers "nothing there" that of the config."""
    words = _read_json(path)
    if path.name == "tokenizer.json":
        model = words.get("model")
        words = model.get("vocab", {}) if isinstance(model, dict) else {}
    if not isinstance(words, dict) or not all(isinstance(index, int) for index in words.values()):
        raise ValueError(f"{path}: has a damaged vocabulary; expected ids by word.")
    named = {index: word for word, index in words.items()}
    if len(named) != len(words):
        raise ValueError(f"{path}: has {len(words)} words for {len(named)} ids.")
    none = config.none_token_id
    if words and named.get(none, "").strip("Ġ").lower() != "none":
        raise ValueError(
            f"{path}: the id {none}, the config's none_token_id, is of {named.get(none)!r}; expected the word none. "
            "The tokenizer is another model's."
        )


def _added_tokens(path: Path) -> dict[str, Any]:
    """Ids by token, of any of the three files that may hold them; {} if it names none of the model's tokens.

    Raises:
        ValueError: tokens in another form than transformers writes.
    """
    content = _read_json(path)
    try:
        if "added_tokens_decoder" in content:
            ids = {entry["content"]: int(index) for index, entry in content["added_tokens_decoder"].items()}
        elif "added_tokens" in content:
            ids = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
        else:
            ids = content
        return ids if any(token in ids for token in TOKENS) else {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: has damaged tokens ({type(error).__name__}: {error}).") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a JSON object.")
    return content


def _read_header(path: Path) -> Header:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ValueError(f"{path}: is a Git LFS pointer; fetch the file itself with `git lfs pull`.")
        if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"{path}: is no safetensors file, or cut off: {size} bytes, a header of {length}.")
        try:
            header = json.loads(file.read(length).decode())
            header.pop("__metadata__", None)
            tensors = {name: Stored(entry["dtype"], list(entry["shape"])) for name, entry in header.items()}
            spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
            sizes = {name: math.prod(shape) * DTYPES[dtype] // 8 for name, (dtype, shape) in tensors.items()}
            place = 0
            for begin, end, name in spans:
                if begin != place or end - begin != sizes[name] or any(side < 0 for side in tensors[name].shape):
                    raise ValueError(f"{name} is at {begin}…{end}; expected {place}…{place + sizes[name]}")
                place = end
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: has a damaged header ({type(error).__name__}: {error}).") from error
    if 8 + length + place != size:
        raise ValueError(f"{path}: has {size} bytes; its header tells of {8 + length + place}. Fetch it again.")
    return tensors


def _check_weights(folder: Path, stored: Header, model: Any, exact: bool) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.text_config.tie_word_embeddings:
        expected.pop("language_model.lm_head.weight")
    absent = sorted(expected.keys() - stored.keys())
    if absent:
        raise ValueError(f"{folder}: its weights lack {_some(absent)}; transformers would fill them in at random.")
    whole = sorted(name for name in expected if stored[name].dtype not in FLOATING)
    if whole:
        raise ValueError(
            f"{folder}: {_some(whole)} are {stored[whole[0]].dtype}; expected floating point, for the config tells of "
            "no quantisation."
        )
    others = [name for name, shape in expected.items() if stored[name].shape != shape]
    if exact and others:
        name = others[0]
        raise ValueError(
            f"{folder}: {name} is {stored[name].shape}, but the config makes it {expected[name]} "
            f"({len(others)} tensors differ); the weights are another model's."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


__all__ = ["CheckedLoading", "check_tokenizer", "or_value_error", "read_header"]
