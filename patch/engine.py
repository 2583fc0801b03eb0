# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Our model over another model's modules: every linear, norm and embedding is the loaded model's own object."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn

GRID = "vision_model.patch_embed.pos_emb"  # called differently here and in the stock: only its weight is lent
ROTARY = "language_model.model.rotary_emb"  # its frequencies are made by its constructor, and are no weights
WHOLE = ("mlp", "mlp1")  # plain functions of one tensor: lent whole, not linear by linear


def unwrapped(model: Any) -> Any:
    """The model inside peft's or torch.compile's wrapper; or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Engine:
    """The drop-in over one stock model.

    Args:
        stock: a loaded stock model. drop_in: the drop-in's class.
    """

    def __init__(self, stock: nn.Module, drop_in: Any):
        self.stock = weakref.ref(stock)
        self.drop_in = drop_in
        self.described: dict[str, Any] | None = None
        self.idle: list[Shadow] = []

    @contextmanager
    def model(self) -> Iterator[Any]:
        """The drop-in over the stock's modules, configuration and generation config as they are now.

        The modules are given back at the end, so that nothing here keeps the stock model alive; calls in several
        threads have a shadow each.

        Raises:
            ValueError: the stock model lacks a module, or is spread over several devices without accelerate's hooks.
        """
        stock: Any = self.stock()
        described = stock.config.to_dict()
        if described != self.described:
            self.described, self.idle = copy.deepcopy(described), []
        idle = self.idle
        shadow = idle.pop() if idle else Shadow(self.drop_in, described)
        try:
            shadow.borrow(stock)
            yield shadow.model
        finally:
            shadow.give_back()
            idle.append(shadow)


class Shadow:
    """A drop-in model without weights, which borrows those of a stock model for the time of a call.

    Args:
        drop_in: the drop-in's class. described: the stock's configuration.
    """

    def __init__(self, drop_in: Any, described: dict[str, Any]):
        # "magi" and flash are what the stock runs on; ours attends by SDPA, which every machine has
        described = {name: value for name, value in described.items() if "attn_implementation" not in name}
        config = drop_in.config_class.from_dict(described)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.model = drop_in(config).eval()
        modules = dict(self.model.named_modules())
        self.lent = [name for name, module in modules.items() if name != GRID and module._parameters]
        self.lent = [name for name in self.lent if name.split(".")[-2] not in WHOLE]
        self.lent += [name for name in modules if name.split(".")[-1] in WHOLE]
        inside = tuple(f"{name}." for name in self.lent)
        self.own = {name: m for name, m in modules.items() if name not in self.lent and not name.startswith(inside)}

    def borrow(self, stock: nn.Module) -> None:
        """Puts the stock's modules in the places of the shadow's."""
        found: dict[str, Any] = {"": stock}
        for name in [*self.own, *self.lent]:
            if name:
                parent, _, part = name.rpartition(".")
                found[name] = getattr(unwrapped(found[parent]), part, None)
        for name in [*self.lent, GRID]:
            if found[name] is None:
                raise ValueError(f"patch: the model has no {name!r}; its modules are not those of LocateAnything.")
        for name in self.lent:
            parent, _, part = name.rpartition(".")
            self.own[parent]._modules[part] = found[name]
        self.own[GRID]._parameters["weight"] = found[GRID].weight
        self.model.generation_config = getattr(stock, "generation_config", None) or self.model.generation_config
        self.place_rotary(found[ROTARY])
        hooked = [self.follow(name, found[name]) for name in self.own if name]
        devices = {parameter.device for parameter in self.model.parameters()}
        if len(devices) > 1 and not any(hooked):
            raise ValueError(
                f"patch: the model's modules are on {sorted(map(str, devices))} without accelerate's hooks; load it "
                "with device_map=, or put it on one device."
            )
        deaf = [name for name in self.own if name and has_hooks(found[name])]
        if deaf:
            warnings.warn(
                f"patch: the batched generate does not call the hooks on {', '.join(deaf)}, whose parts it runs; it "
                "calls those on linears, norms, embeddings, heads and MLPs.",
                stacklevel=2,
            )

    def follow(self, name: str, twin: Any) -> bool:
        """Where accelerate runs the stock's module on a device of its choice, so it does with ours."""
        own = self.own[name]
        if hasattr(own, "_hf_hook"):
            remove_hook_from_module(own)
        hook = getattr(twin, "_hf_hook", None)
        if not isinstance(hook, AlignDevicesHook):
            return False
        if name == GRID and hook.offload:
            hook = copy.copy(hook)  # fetches the weight from where the stock's does
        else:
            hook = AlignDevicesHook(hook.execution_device, skip_keys=self.model._skip_keys_device_placement)
        add_hook_to_module(own, hook)
        return True

    def place_rotary(self, twin: Any) -> None:
        """Puts the rotary embedding where the stock's runs, or else beside the token embedding."""
        place = getattr(getattr(twin, "_hf_hook", None), "execution_device", None)
        device = self.model._place_of(self.model.get_input_embeddings()) if place is None else torch.device(place)
        rotary = self.own[ROTARY]
        if rotary.inv_freq.device != device:
            with torch.device(device):
                self.own[ROTARY] = type(rotary)(self.model.config.text_config)
            self.model.language_model.model.rotary_emb = self.own[ROTARY]

    def give_back(self) -> None:
        for name in self.lent:
            parent, _, part = name.rpartition(".")
            self.own[parent]._modules[part] = None
        self.own[GRID]._parameters["weight"] = None


def has_hooks(module: Any) -> bool:
    return bool(getattr(module, "_forward_hooks", None) or getattr(module, "_forward_pre_hooks", None))
