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
import functools
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, StoppingCriteria
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .engine import Engine, unwrapped

__version__ = "0.1.0"
__all__ = ["Status", "applied", "apply", "degenerate_answer_criteria", "revert", "status"]

STOCK_NAME = "LocateAnythingForConditionalGeneration"
DROP_IN = "modeling_locateanything_batched.LocateAnythingBatchedForConditionalGeneration"
# not resolved: in a hub snapshot this file is a link out of the folder that holds the code
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

_ABSENT = object()
_BEFORE = "_generate_before_patch"  # where a patched model or class keeps a `generate` of its own, to be put back
_instances: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_classes: weakref.WeakSet[type] = weakref.WeakSet()
_engines: weakref.WeakKeyDictionary[torch.nn.Module, Engine] = weakref.WeakKeyDictionary()
_sources: list[str] = []  # of apply() without a model: the code's folder or hub id, while it holds
_subclass_hook: Any = _ABSENT  # PreTrainedModel's own, while ours stands before it
_our_hook: Any = None


@dataclass(frozen=True)
class Status:
    """What is patched. instances, classes: names. everywhere: whether classes imported later are patched too."""

    version: str
    everywhere: bool
    classes: tuple[str, ...]
    instances: tuple[str, ...]


def apply(target: torch.nn.Module | type | None = None, *, source: str | os.PathLike[str] = HERE) -> Any:
    """Gives a stock LocateAnything model the batched `generate`.

    Args:
        target: a model (or peft's or torch.compile's wrapper of one), its class, or None for every LocateAnything
            class, also those whose module is imported only later. Applying twice is applying once; another `source`
            takes the place of the first.
        source: where the engine's code is: a folder (this clone, a hub snapshot; `~` is the home) or a hub id.

    Returns:
        `target`.

    Raises:
        TypeError: something that is not LocateAnything, or this project's own model, which needs no patch.
        OSError: `source` does not hold the code.
    """
    source = _place(source)
    if target is None:
        _apply_everywhere(source)
        return None
    _put(_owner_of(target), _generate_of(source))
    return target


def revert(target: torch.nn.Module | type | None = None) -> None:
    """Takes back what `apply` with the same target did.

    Args:
        target: as of `apply`. None takes back everything but what nobody knows of: a deep copy of a patched model that
            has not generated yet, which is taken back as a target of its own.

    Raises:
        TypeError: something that is not LocateAnything. That nothing was applied is no error.
    """
    if target is None:
        for model in list(_instances):
            revert(model)
        for cls in list(_classes):
            revert(cls)
        _stop_noticing()
        return
    owner = _owner_of(target)
    # a copy of a patched model is patched too, and in no list before its first call
    if not _is_patched(owner) and owner not in _patched(owner):
        return
    _patched(owner).discard(owner)
    for served in [model for model in _engines if owner in (model, type(model))]:
        del _engines[served]
    if "generate" in vars(owner):
        del owner.generate
    if _BEFORE in vars(owner):
        owner.generate = vars(owner)[_BEFORE]
        delattr(owner, _BEFORE)


@contextlib.contextmanager
def applied(target: torch.nn.Module | type | None = None, *, source: str | os.PathLike[str] = HERE) -> Iterator[Any]:
    """`apply`, and `revert` at the end of the block; what was patched before it stays patched, with its own source.

    Args:
        target: as of `apply`.
        source: as of `apply`.

    Raises:
        TypeError, OSError: as `apply`.
    """
    if target is not None:
        owner = _owner_of(target)
        before = _own_generate(owner)
        apply(target, source=source)
        try:
            yield target
        finally:
            _put_back(owner, before)
        return
    sources, classes = list(_sources), {cls: _own_generate(cls) for cls in _classes}
    apply(source=source)
    try:
        yield None
    finally:
        if sources:
            _sources[:] = sources
        else:
            _stop_noticing()
        for cls in list(_classes):
            # a class that was imported in the block is served as those before it
            _put_back(cls, classes.get(cls) or (_generate_of(sources[0]) if sources else None))


def status() -> Status:
    """What is patched now, and by which version."""
    return Status(
        __version__,
        bool(_sources),
        tuple(sorted(f"{cls.__module__}.{cls.__qualname__}" for cls in _classes)),
        tuple(sorted(f"{type(model).__qualname__} at {id(model):#x}" for model in _instances)),
    )


def degenerate_answer_criteria(
    model: torch.nn.Module, *, source: str | os.PathLike[str] = HERE, **options: int
) -> StoppingCriteria:
    """What the drop-in's method of that name gives: a stopping criterion for answers that go round in circles.

    Args:
        model: the stock model, for its token ids.
        source: as of `apply`.
        options: `period`, `times`, `march`, `thin`.

    Raises:
        ValueError: a number out of range.
    """
    config, criteria = (
        get_class_from_dynamic_module(name, _place(source))
        for name in ("configuration.LocateAnythingConfig", "grounding.DegenerateAnswerCriteria")
    )
    return criteria(config.from_dict(unwrapped(model).config.to_dict()).token_roles, **options)


def _place(source: str | os.PathLike[str]) -> str:
    """A folder or hub id as transformers takes it.

    Raises:
        OSError: it can be neither.
    """
    place = os.path.expanduser(os.fspath(source))
    if not os.path.isdir(place):
        try:
            validate_repo_id(place)
        except HFValidationError as error:
            raise FileNotFoundError(f"source: got {place}, expected a folder or a hub id") from error
    return place


def _owner_of(target: Any) -> Any:
    """The class, or the model inside its wrappers, that holds `generate`.

    Raises:
        TypeError: it is not LocateAnything.
    """
    owner = target if isinstance(target, type) else unwrapped(target)
    _check(owner if isinstance(owner, type) else type(owner), target)
    return owner


def _check(cls: type, target: Any) -> None:
    if hasattr(cls, "embed_prompt"):
        raise TypeError(f"{cls.__name__} is this project's own model: its generate takes batches already.")
    if not _is_stock(cls):
        what = cls.__name__ if target is cls else f"a {cls.__module__}.{cls.__name__}"
        raise TypeError(f"patch: got {what}; expected {STOCK_NAME}, loaded from the official remote code.")


def _is_stock(cls: type) -> bool:
    config = getattr(cls, "config_class", None)
    return (
        any(base.__name__ == STOCK_NAME for base in cls.__mro__)
        and getattr(config, "model_type", None) == "locateanything"
        and not hasattr(cls, "embed_prompt")
    )


def _patched(owner: Any) -> weakref.WeakSet[Any]:
    return _classes if isinstance(owner, type) else _instances


def _is_patched(owner: Any) -> bool:
    """Whether the `generate` that the object itself holds is ours."""
    return _own_generate(owner) is not None


def _own_generate(owner: Any) -> Any:
    """Our `generate` that the object itself holds, or None."""
    own = vars(owner).get("generate")
    return own if hasattr(getattr(own, "__func__", own), "drop_in") else None


def _put_back(owner: Any, before: Any) -> None:
    """Ends a block: ours of before it, or none; what was reverted in the block stays so."""
    if before is None:
        revert(owner)
    elif _is_patched(owner):
        owner.generate = before


def _put(owner: Any, generate: Any) -> None:
    """Puts our function into a class, or bound into an instance, and remembers what was there."""
    if "generate" in vars(owner) and not _is_patched(owner):
        setattr(owner, _BEFORE, vars(owner)["generate"])
    _patched(owner).add(owner)
    owner.generate = generate if isinstance(owner, type) else MethodType(generate, owner)


def _apply_everywhere(source: str) -> None:
    """Patches the stock classes that are there, and those that appear when their module is imported."""
    global _subclass_hook, _our_hook
    generate = _generate_of(source)
    for cls in _subclasses(PreTrainedModel):
        if cls.__name__ == STOCK_NAME and _is_stock(cls):
            _put(cls, generate)
    _sources[:] = [source]
    if _subclass_hook is not _ABSENT:
        return
    _subclass_hook = PreTrainedModel.__dict__.get("__init_subclass__")
    before = PreTrainedModel.__init_subclass__

    def notice(cls: type, *args: Any, **kwargs: Any) -> None:
        before.__func__(cls, *args, **kwargs) if hasattr(before, "__func__") else before(*args, **kwargs)
        # without sources it is a leftover that another library's hook still calls
        if _sources and cls.__name__ == STOCK_NAME and _is_stock(cls):
            _put(cls, _generate_of(_sources[0]))

    _our_hook = classmethod(notice)
    PreTrainedModel.__init_subclass__ = _our_hook


def _stop_noticing() -> None:
    global _subclass_hook
    _sources.clear()
    if _subclass_hook is _ABSENT:
        return
    # another library's hook that came later stays
    if PreTrainedModel.__dict__.get("__init_subclass__") is _our_hook:
        del PreTrainedModel.__init_subclass__
        if _subclass_hook is not None:
            PreTrainedModel.__init_subclass__ = _subclass_hook
    _subclass_hook = _ABSENT


def _subclasses(cls: Any) -> Iterator[Any]:
    """All classes below one, whether their module is still to be found or has been imported anew since."""
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


@functools.lru_cache
def _generate_of(source: str) -> Any:
    """The function that takes the place of the stock's `generate`, with the code of a folder or hub id."""
    drop_in = get_class_from_dynamic_module(DROP_IN, source)

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
        if _is_patched(self):
            _instances.add(self)  # it may be a copy of a patched model
        engine = _engines.get(self)
        if engine is None or engine.drop_in is not drop_in:
            engine = _engines[self] = Engine(self, drop_in)
        with engine.model() as model:
            return model.generate(
                pixel_values=pixel_values,
                input_ids=input_ids,
                attention_mask=attention_mask,
                visual_features=visual_features,
                image_grid_hws=image_grid_hws,
                tokenizer=tokenizer,
                n_future_tokens=n_future_tokens,
                **generate_kwargs,
            )

    generate.drop_in = drop_in  # type: ignore[attr-defined]  # and by this we know it again
    return generate
