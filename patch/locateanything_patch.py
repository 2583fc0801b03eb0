# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Batched `generate` for a LocateAnything model that is loaded already, from its own remote code.

    sys.path.append("/some/where/locateanything-batched/patch")  # one module, so nothing gets in the way of yours
    import locateanything_patch as patch

    patch.apply(model)              # this instance
    patch.apply()                   # the class: every instance, loaded before or after
    with patch.applied(model): …    # for a while
    patch.revert(model); patch.revert()
    patch.status()
    patch.post_process_grounding(processor, outputs, target_sizes=…)

The model keeps its class, parameters, forward and hooks; only `generate`, `generate_batch` and continuous batching go
through our engine, on the very same modules. No weight is copied. docs/patch.md has a whole example.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, StoppingCriteria
from transformers.dynamic_module_utils import get_class_from_dynamic_module

__version__ = "0.2.0"
__all__ = ["Status", "applied", "apply", "degenerate_answer_criteria", "post_process_grounding", "revert", "status"]

STOCK = "LocateAnythingForConditionalGeneration"
BATCHED = "modeling_locateanything_batched.LocateAnythingBatchedForConditionalGeneration"
# Not resolved: in a hub snapshot this file is a link out of the folder that holds the code
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The stock's arguments in their order, which is not transformers'
ORDER = (
    *("pixel_values", "input_ids", "attention_mask", "visual_features", "image_grid_hws", "tokenizer"),
    "n_future_tokens",
)
GRID = "vision_model.patch_embed.pos_emb"  # called differently here and in the stock: only its weight is lent
ROTARY = "language_model.model.rotary_emb"  # its frequencies are made by its constructor, and are no weights
# The drop-in's other methods, which come and go with `generate`
BATCHING = ("init_continuous_batching", "continuous_batching_context_manager", "generate_batch")
WHOLE = ("mlp", "mlp1")  # plain functions of one tensor: lent whole, not linear by linear

_BEFORE = "_generate_before_patch"  # where a patched model or class keeps a `generate` of its own, to be put back
_patched: weakref.WeakSet[Any] = weakref.WeakSet()  # models and classes
_everywhere: list[Any] = []  # our `generate` for classes to come, while apply() without a target holds


@dataclass(frozen=True)
class Status:
    """What is patched. classes, instances: names. everywhere: whether classes imported later are patched too."""

    version: str
    everywhere: bool
    classes: tuple[str, ...]
    instances: tuple[str, ...]


def apply(target: nn.Module | type | None = None, *, source: str | os.PathLike[str] = HERE) -> Any:
    """Gives a stock LocateAnything model the batched `generate`; returns `target`.

    Args:
        target: a model (or peft's or torch.compile's wrapper of one), its class, or None for every LocateAnything
            class, also those whose module is imported only later. Applying twice is applying once; another `source`
            takes the place of the first.
        source: where the engine's code is: this clone, another folder, or a hub id.

    Raises:
        TypeError: something that is not LocateAnything, or this project's own model, which needs no patch.
        OSError, ValueError: `source` does not hold the code, or is neither a folder nor a hub id.
    """
    generate = _generate_of(os.path.expanduser(os.fspath(source)))
    if target is not None:
        _put(_owner_of(target), generate)
        return target
    for cls in _subclasses(PreTrainedModel):
        if _is_stock(cls):
            _put(cls, generate)
    _everywhere[:] = [generate]
    _watch()
    return None


def revert(target: nn.Module | type | None = None) -> None:
    """Takes back what `apply` with the same target did.

    Args:
        target: as of `apply`. None takes back everything but what nobody knows of: a deep copy of a patched model that
            has not generated yet, which is taken back as a target of its own.

    Raises:
        TypeError: something that is not LocateAnything. That nothing was applied is no error.
    """
    if target is None:
        _everywhere.clear()
    for owner in list(_patched) if target is None else [_owner_of(target)]:
        _patched.discard(owner)
        for name in ("generate", *BATCHING):
            if _is_ours(vars(owner).get(name)):
                delattr(owner, name)
        if _BEFORE in vars(owner):
            owner.generate = vars(owner)[_BEFORE]
            delattr(owner, _BEFORE)


@contextlib.contextmanager
def applied(target: nn.Module | type | None = None, *, source: str | os.PathLike[str] = HERE) -> Iterator[Any]:
    """`apply`, and `revert` at the end of the block; what was patched before it stays patched, with its own source.

    Args:
        target, source: as of `apply`.

    Raises:
        TypeError, OSError, ValueError: as `apply`.
    """
    everywhere = list(_everywhere)
    owners: list[Any] = _classes() if target is None else [_owner_of(target)]
    before = {owner: generate for owner in owners if _is_ours(generate := vars(owner).get("generate"))}
    apply(target, source=source)
    try:
        yield target
    finally:
        _everywhere[:] = everywhere
        for owner in _classes() if target is None else owners:
            # A class that was imported in the block is served as those before it
            generate = before.get(owner, everywhere[0] if target is None and everywhere else None)
            if generate is None:
                revert(owner)
            elif _is_ours(vars(owner).get("generate")):  # and was not reverted in the block
                _put(owner, generate)


def status() -> Status:
    """What is patched now, and by which version."""
    classes = [f"{cls.__module__}.{cls.__qualname__}" for cls in _classes()]
    models = [f"{type(model).__qualname__} at {id(model):#x}" for model in _patched if not isinstance(model, type)]
    return Status(__version__, bool(_everywhere), tuple(sorted(classes)), tuple(sorted(models)))


def degenerate_answer_criteria(model: nn.Module, **options: Any) -> StoppingCriteria:
    """A stopping criterion for answers that go round in circles; options of `answers.DegenerateAnswerCriteria`."""
    config = _ours("configuration.LocateAnythingConfig").from_dict(unwrapped(model).config.to_dict())
    return _ours("answers.DegenerateAnswerCriteria")(config.token_roles, **options)


def post_process_grounding(processor: Any, outputs: Any, **options: Any) -> list[dict[str, Any]]:
    """Boxes and points of each answer, with scores: `grounding.GroundingMixin`'s method of that name.

    Args:
        processor: the stock's processor, or its tokenizer.
        outputs: what `generate` returned.
        options: of that method: `target_sizes` ((height, width) in pixels for each row), `threshold`.
    """
    reader = _ours("grounding.GroundingMixin")()
    reader.tokenizer = getattr(processor, "tokenizer", processor)
    return reader.post_process_grounding(outputs, **options)


def _ours(name: str, source: str = HERE) -> Any:
    return get_class_from_dynamic_module(name, source)


@functools.lru_cache
def _generate_of(source: str) -> Any:
    """The function that takes the place of the stock's `generate`, with the code of a folder or hub id."""
    drop_in = _ours(BATCHED, source)

    @torch.no_grad()
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The batched generate, with the stock's order of arguments. See the drop-in model's `generate`."""
        if _is_ours(vars(self).get("generate")):
            _patched.add(self)  # it may be a copy of a patched model
        return batched(self, drop_in).generate(**dict(zip(ORDER, args, strict=False)), **kwargs)

    generate.drop_in = drop_in  # type: ignore[attr-defined]  # and by this we know it again
    return generate


@functools.lru_cache
def _method_of(name: str, drop_in: Any) -> Any:
    """Another method of the drop-in."""

    @functools.wraps(getattr(drop_in, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(batched(self, drop_in), name)(*args, **kwargs)

    method.drop_in = drop_in  # type: ignore[attr-defined]
    # what a pickled model has in its place: pickle finds methods by their names, and 4.57 lacks one of these
    method.__name__ = name if hasattr(GenerationMixin, name) else "generate"
    return method


def _classes() -> list[Any]:
    return [owner for owner in _patched if isinstance(owner, type)]


def _is_ours(generate: Any) -> bool:
    return hasattr(getattr(generate, "__func__", generate), "drop_in")


def _put(owner: Any, generate: Any) -> None:
    """Puts our function into a class, or bound into an instance, and remembers what was there; and BATCHING beside."""
    if "generate" in vars(owner) and not _is_ours(vars(owner)["generate"]):
        setattr(owner, _BEFORE, vars(owner)["generate"])
    _patched.add(owner)
    generate = getattr(generate, "__func__", generate)
    for name in ("generate", *BATCHING):
        ours = generate if name == "generate" else _method_of(name, generate.drop_in)
        setattr(owner, name, ours if isinstance(owner, type) else MethodType(ours, owner))


def _owner_of(target: Any) -> Any:
    """The class, or the model inside its wrappers, that holds `generate`; a TypeError if it is not LocateAnything."""
    owner = target if isinstance(target, type) else unwrapped(target)
    cls = owner if isinstance(owner, type) else type(owner)
    if hasattr(cls, "embed_prompt"):
        raise TypeError(f"{cls.__name__} is this project's own model: its generate takes batches already.")
    if not (issubclass(cls, PreTrainedModel) and any(map(_is_stock, cls.__mro__))):
        what = cls.__name__ if target is cls else f"a {cls.__module__}.{cls.__name__}"
        raise TypeError(f"patch: got {what}; expected {STOCK}, loaded from the official remote code.")
    return owner


def _is_stock(cls: type) -> bool:
    return cls.__name__ == STOCK and not hasattr(cls, "embed_prompt")  # as our own model has


def _subclasses(cls: Any) -> Iterator[Any]:
    """All classes below one, whether their module is still to be found or has been imported anew since."""
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


@functools.cache
def _watch() -> None:
    """From now on `PreTrainedModel` tells of each class below it; that counts while something is in `_everywhere`."""
    before = PreTrainedModel.__dict__.get("__init_subclass__")

    def tell(cls: type, **kwargs: Any) -> None:
        if before is None:
            super(PreTrainedModel, cls).__init_subclass__(**kwargs)
        else:
            before.__get__(None, cls)(**kwargs)
        if _everywhere and _is_stock(cls):
            _put(cls, _everywhere[0])

    PreTrainedModel.__init_subclass__ = classmethod(tell)


def unwrapped(model: Any) -> Any:
    """The model inside peft's or torch.compile's wrapper; or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@functools.lru_cache(maxsize=8)
def _frame(drop_in: Any, described: str) -> tuple[Any, tuple[str, ...]]:
    """The drop-in with empty places for all that has weights, and their names, for the JSON of a configuration."""
    # "magi" and flash are what the stock runs on, ours attends by SDPA, which every machine has; adapters are lent
    foreign = ("attn_implementation", "dtype", "_lora")
    values = json.loads(
        described, object_hook=lambda part: {key: part[key] for key in part if not key.endswith(foreign)}
    )
    config = drop_in.config_class.from_dict(values)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = drop_in(config).eval()
    lent: list[str] = []
    for name, module in list(model.named_modules()):
        parent, _, part = name.rpartition(".")
        inside = any(name.startswith(f"{whole}.") for whole in lent)
        if name != GRID and not inside and (part in WHOLE or module._parameters):
            lent.append(name)
            model.get_submodule(parent)._modules[part] = None
    model.get_submodule(GRID)._parameters["weight"] = None
    return model, tuple(lent)


def batched(stock: Any, drop_in: Any) -> Any:
    """The drop-in for one call: every linear, norm and embedding is the stock model's own object, as it is now.

    Args:
        stock: a loaded stock model.
        drop_in: the drop-in's class.

    Raises:
        ValueError: the stock model lacks a module, or is spread over several devices without accelerate's hooks.
    """
    frame, lent = _frame(drop_in, json.dumps(stock.config.to_dict(), default=str))
    model = copy.deepcopy(frame)
    own = {name: module for name, module in model.named_modules() if name}
    twins: dict[str, Any] = {"": stock}
    for name in sorted([*own, *lent]):
        parent, _, part = name.rpartition(".")
        twins[name] = getattr(unwrapped(twins[parent]), part, None)
        if twins[name] is None and (name in lent or name == GRID):
            raise ValueError(f"patch: the model has no {name!r}; its modules are not those of LocateAnything.")
        if name in lent:
            (own[parent] if parent else model)._modules[part] = twins[name]
    own[GRID]._parameters["weight"] = twins[GRID].weight
    model.generation_config = getattr(stock, "generation_config", None) or model.generation_config
    _place_rotary(model, twins)
    hooked = [_follow(name, model, twins[name]) for name in own]
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 and not any(hooked):
        raise ValueError(
            f"patch: the model's modules are on {sorted(map(str, devices))} without accelerate's hooks; load it with "
            "device_map=, or put it on one device."
        )
    called = ("_forward_hooks", "_forward_pre_hooks")
    if deaf := [name for name in own if any(getattr(twins[name], kind, None) for kind in called)]:
        warnings.warn(
            f"patch: the batched generate does not call the hooks on {', '.join(deaf)}, whose parts it runs; it calls "
            "those on linears, norms, embeddings, heads and MLPs.",
            stacklevel=4,
        )
    return model


def _place_rotary(model: Any, twins: dict[str, Any]) -> None:
    """Makes the rotary embedding where the stock's runs, or else beside the token embedding."""
    embedding = model.get_input_embeddings()
    hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in (twins[ROTARY], embedding)]
    places = [hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None]
    with torch.device(places[0] if places else next(embedding.parameters()).device):
        rotary = type(model.get_submodule(ROTARY))(model.config.text_config)
    model.language_model.model.rotary_emb = rotary


def _follow(name: str, model: Any, twin: Any) -> bool:
    """Where accelerate runs the stock's module on a device of its choice, so it does with ours."""
    hook = getattr(twin, "_hf_hook", None)
    if not isinstance(hook, AlignDevicesHook):
        return False
    if name == GRID and hook.offload:
        hook = copy.copy(hook)  # fetches the weight from where the stock's does
    else:
        hook = AlignDevicesHook(hook.execution_device, skip_keys=model._skip_keys_device_placement)
    add_hook_to_module(model.get_submodule(name), hook)
    return True
