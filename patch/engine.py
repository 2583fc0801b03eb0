# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Our model over another model's modules: every linear, norm and embedding is the loaded model's own object."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

DROP_IN = "modeling_locateanything_batched.LocateAnythingBatchedForConditionalGeneration"


def unwrapped(model: Any) -> Any:
    """The model inside peft's wrapper, which has the adapters injected into its modules; or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Engine:
    """The drop-in model, built on the meta device, with the stock model's modules in the place of its own.

    Modules are looked up again before each use, so that adapters put in or taken out later are seen; values and
    devices are the modules' own affair.

    Args:
        stock: a loaded stock model. source: folder or hub id of the drop-in's code.
    """

    def __init__(self, stock: nn.Module, source: str):
        cls = get_class_from_dynamic_module(DROP_IN, source)
        config = cls.config_class.from_dict(stock.config.to_dict())
        with torch.device("meta"):
            self.shadow = cls(config).eval()
        self.stock = weakref.ref(stock)
        self.leaves = [name for name, module in self.shadow.named_modules() if is_leaf(module)]
        generation_config = getattr(stock, "generation_config", None)
        if generation_config is not None:
            self.shadow.generation_config = generation_config

    def model(self) -> Any:
        """The drop-in over the stock's modules as they are now.

        Raises:
            ValueError: the stock model's decoder or tower lacks a module, or is spread over several devices.
        """
        stock = self.stock()
        for name in self.leaves:
            parent, _, attribute = name.rpartition(".")
            self.shadow.get_submodule(parent)._modules[attribute] = module_of(stock, name)
        grid = self.shadow.vision_model.patch_embed.pos_emb
        grid._parameters["weight"] = module_of(stock, "vision_model.patch_embed.pos_emb").weight
        devices = {parameter.device for parameter in self.shadow.parameters()}
        if len(devices) != 1:
            raise ValueError(
                f"patch: the model's modules are on {sorted(map(str, devices))}; a patched model must be on one "
                "device, the drop-in itself need not be."
            )
        (device,) = devices
        rotary = self.shadow.language_model.model.rotary_emb
        if rotary.inv_freq.device != device:
            # its frequencies are made by its constructor, and are no weights
            with torch.device(device):
                self.shadow.language_model.model.rotary_emb = type(rotary)(self.shadow.config.text_config)
        return self.shadow


def is_leaf(module: nn.Module) -> bool:
    """A module that holds parameters itself; the position grid's are shared one by one."""
    return bool(module._parameters) and type(module).__name__ != "PositionGrid"


def module_of(stock: nn.Module, name: str) -> nn.Module:
    """The stock's module of that name, looked up through peft's wrappers."""
    module = stock
    for part in name.split("."):
        module = unwrapped(module)
        if not hasattr(module, part):
            raise ValueError(f"patch: the model has no {name!r}; its modules are not those of LocateAnything.")
        module = getattr(module, part)
    return module
