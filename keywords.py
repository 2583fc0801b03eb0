# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The keywords of a processor's call, as transformers nests them: checked and sorted."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .image_processing import is_count, is_list
from .media import shorten

MAX_LENGTH = 2**20  # tokens that a row can be padded to
_TEXT_KWARGS = frozenset(
    [
        "add_special_tokens",
        "max_length",
        "pad_to_multiple_of",
        "padding",
        "padding_side",
        "return_tensors",
        "truncation",
    ]
)
_IMAGE_KWARGS = frozenset(["return_tensors"])
_VIDEO_KWARGS = frozenset(["fps", "return_tensors", "timestamps"])
_NESTED_KWARGS = {
    "text_kwargs": _TEXT_KWARGS,
    "images_kwargs": _IMAGE_KWARGS,
    "videos_kwargs": _VIDEO_KWARGS,
    "common_kwargs": frozenset(["return_tensors"]),
}


@dataclass(frozen=True)
class Options:
    """The keywords of a call, sorted.

    padding: those of the tokenizer's `pad`. special: add_special_tokens. fps, timestamps: per video, or None.
    """

    KNOWN: ClassVar = _TEXT_KWARGS | _VIDEO_KWARGS | _NESTED_KWARGS.keys()

    padding: dict[str, Any]
    special: bool
    return_tensors: str | None
    fps: Any
    timestamps: Any

    @classmethod
    def of(cls, kwargs: Mapping[str, Any]) -> Options:
        flat = {name: value for name, value in kwargs.items() if name not in _NESTED_KWARGS}
        merged: dict[str, Any] = {}
        for group, known in _NESTED_KWARGS.items():
            nested = {} if kwargs.get(group) is None else kwargs[group]
            if not isinstance(nested, Mapping):
                raise ValueError(f"{group}: got a {type(nested).__name__}; expected a dict of keywords.")
            refuse_unknown(nested, known, group)
            twice = nested.keys() & flat.keys()
            if twice:
                raise ValueError(f"{', '.join(sorted(twice))}: given twice, in {group} and as a keyword.")
            merged.update(nested)
        refuse_unknown(flat, _TEXT_KWARGS | _VIDEO_KWARGS, "the processor")
        merged.update(flat)
        tensors = merged.pop("return_tensors", None)
        if tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors: got {tensors!r}; expected 'pt', 'np' or None.")
        if merged.pop("truncation", None) not in (None, False, "do_not_truncate"):
            raise ValueError("truncation: a cut prompt would lose image slots; shorten the question, or drop images.")
        fps, timestamps = merged.pop("fps", None), merged.pop("timestamps", None)
        special = merged.pop("add_special_tokens", True)
        if not isinstance(special, bool):
            raise ValueError(f"add_special_tokens: got {special!r}; expected True or False.")
        _check_padding(merged)
        return cls(merged, special, tensors, fps, timestamps)

    def per_video(self, videos: int) -> tuple[list[Any], list[Any]]:
        """The rate and the times of each of `videos` videos, None where they are not given."""
        rates = [self.fps] * videos if isinstance(self.fps, (int, float)) else self.fps
        for name, values in (("fps", rates), ("timestamps", self.timestamps)):
            if values is not None and (not is_list(values) or len(values) != videos):
                raise ValueError(f"{name}: got {values!r}; expected a list of {videos}, one for each video.")
        none = [None] * videos
        return list(rates or none), list(self.timestamps or none)


def _check_padding(given: dict[str, Any]) -> None:
    padding, side = given.get("padding"), given.get("padding_side")
    if not isinstance(padding, (bool, np.bool_)) and padding not in (None, "longest", "max_length", "do_not_pad"):
        raise ValueError(f"padding: got {padding!r}; expected a bool, 'longest', 'max_length' or 'do_not_pad'.")
    if side not in (None, "left", "right"):
        raise ValueError(f"padding_side: got {side!r}; expected 'left' or 'right'.")
    for name in ("max_length", "pad_to_multiple_of"):
        value = given.get(name)
        if value is not None and not (is_count(value) and value <= MAX_LENGTH):
            raise ValueError(f"{name}: got {shorten(value, 30)}; expected a whole number from 1 to {MAX_LENGTH}.")


def refuse_unknown(given: Mapping[str, Any], known: Set[str], where: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise TypeError(f"{where} got an unknown keyword {', '.join(unknown)}; expected some of {sorted(known)}.")


__all__ = ["Options", "refuse_unknown"]
