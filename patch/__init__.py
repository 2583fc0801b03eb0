# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Batched `generate` for a LocateAnything model that is loaded already, from its own remote code.

    import patch

    patch.apply(model)              # this instance
    patch.apply()                   # the class: every instance, loaded before or after
    with patch.applied(model): …    # for a while
    patch.revert(model); patch.revert()
    patch.status()

The model keeps its class, parameters, forward and hooks; only `generate` goes through our engine, on the very same
modules. No weight is copied.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from .engine import Engine, unwrapped

__version__ = "0.1.0"
__all__ = ["Status", "applied", "apply", "revert", "status"]

STOCK_NAME = "LocateAnythingForConditionalGeneration"
HERE = str(Path(__file__).resolve().parent.parent)

_ABSENT = object()
# What stood where `generate` was put, to be put back: of instances and of classes.
_instances: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
_classes: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()
_engines: weakref.WeakKeyDictionary[torch.nn.Module, Engine] = weakref.WeakKeyDictionary()
_sources: list[str] = []  # of apply() without a model: the code's folder or hub id, while it holds
_subclass_hook: Any = _ABSENT


@dataclass(frozen=True)
class Status:
    """What is patched. instances, classes: names. everywhere: whether classes imported later are patched too."""

    version: str
    everywhere: bool
    classes: tuple[str, ...]
    instances: tuple[str, ...]


def apply(target: torch.nn.Module | type | None = None, *, source: str = HERE) -> Any:
    """Gives a stock LocateAnything model the batched `generate`.

    Args:
        target: a model (or a peft wrapper of one), its class, or None for every LocateAnything class, also those whose
            module is imported only later. Applying twice is applying once.
        source: where the engine's code is: a folder (this clone, a hub snapshot) or a hub id.

    Returns:
        `target`.

    Raises:
        TypeError: something that is not LocateAnything, or this project's own model, which needs no patch.
    """
    if target is None:
        _apply_everywhere(source)
        return None
    if isinstance(target, type):
        _check(target, target)
        if target not in _classes:
            _classes[target] = target.__dict__.get("generate", _ABSENT)
            target.generate = _generate_of(source)
        return target
    model = unwrapped(target)
    _check(type(model), target)
    if model not in _instances:
        _instances[model] = model.__dict__.get("generate", _ABSENT)
        model.generate = MethodType(_generate_of(source), model)
    return target


def revert(target: torch.nn.Module | type | None = None) -> None:
    """Takes back what `apply` with the same target did; None takes back everything. Nothing applied is no error."""
    global _subclass_hook
    if target is None:
        for model in list(_instances):
            revert(model)
        for cls in list(_classes):
            revert(cls)
        _sources.clear()
        if _subclass_hook is not _ABSENT:
            del PreTrainedModel.__init_subclass__
            if _subclass_hook is not None:
                PreTrainedModel.__init_subclass__ = _subclass_hook
            _subclass_hook = _ABSENT
        return
    owner = target if isinstance(target, type) else unwrapped(target)
    before = (_classes if isinstance(target, type) else _instances).pop(owner, None)
    if before is None:
        return
    del owner.generate
    if before is not _ABSENT:
        owner.generate = before
    _engines.pop(owner, None)


@contextlib.contextmanager
def applied(target: torch.nn.Module | type | None = None, *, source: str = HERE) -> Iterator[Any]:
    """`apply`, and `revert` at the end of the block; what was patched before the block stays patched."""
    owner = None if target is None else target if isinstance(target, type) else unwrapped(target)
    before = bool(_sources) if owner is None else owner in (_classes if isinstance(owner, type) else _instances)
    apply(target, source=source)
    try:
        yield target
    finally:
        if not before:
            revert(target)


def status() -> Status:
    """What is patched now, and by which version."""
    return Status(
        __version__,
        bool(_sources),
        tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in _classes),
        tuple(f"{type(model).__qualname__} at {id(model):#x}" for model in _instances),
    )


def _check(cls: type, target: Any) -> None:
    if hasattr(cls, "embed_prompt"):
        raise TypeError(f"{cls.__name__} is this project's own model: its generate takes batches already.")
    if not _is_stock(cls):
        what = cls.__name__ if target is cls else f"a {cls.__module__}.{cls.__name__}"
        raise TypeError(f"patch.apply: got {what}; expected {STOCK_NAME}, loaded from the official remote code.")


def _is_stock(cls: type) -> bool:
    config = getattr(cls, "config_class", None)
    return (
        any(base.__name__ == STOCK_NAME for base in cls.__mro__)
        and getattr(config, "model_type", None) == "locateanything"
        and not hasattr(cls, "embed_prompt")
    )


def _apply_everywhere(source: str) -> None:
    """Patches the stock classes that are there, and those that appear when their module is imported."""
    global _subclass_hook
    for module in list(sys.modules.values()):
        cls = getattr(module, "__dict__", {}).get(STOCK_NAME)
        if isinstance(cls, type) and _is_stock(cls):
            apply(cls, source=source)
    _sources[:] = [source]
    if _subclass_hook is not _ABSENT:
        return
    _subclass_hook = PreTrainedModel.__dict__.get("__init_subclass__")
    before = PreTrainedModel.__init_subclass__

    def notice(cls: type, *args: Any, **kwargs: Any) -> None:
        before.__func__(cls, *args, **kwargs) if hasattr(before, "__func__") else before(*args, **kwargs)
        if cls.__name__ == STOCK_NAME and _is_stock(cls):
            apply(cls, source=_sources[0])

    PreTrainedModel.__init_subclass__ = classmethod(notice)


def _generate_of(source: str) -> Any:
    @torch.no_grad()
    def generate(
        self: Any,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        visual_features: Any = None,
        image_grid_hws: Any = None,
        tokenizer: Any = None,
        n_future_tokens: int = 6,
        **generate_kwargs: Any,
    ) -> Any:
        """The batched generate, with the stock's order of arguments. See the drop-in model's `generate`."""
        if self not in _engines:
            _engines[self] = Engine(self, source)
        return (
            _engines[self]
            .model()
            .generate(
                pixel_values=pixel_values,
                input_ids=input_ids,
                attention_mask=attention_mask,
                visual_features=visual_features,
                image_grid_hws=image_grid_hws,
                tokenizer=tokenizer,
                n_future_tokens=n_future_tokens,
                **generate_kwargs,
            )
        )

    return generate
