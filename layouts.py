# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Which picture or video fills which placeholder of which text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from .image_processing import Source, is_array, is_list, is_number

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


@dataclass(frozen=True)
class Plan:
    """What a text asks for: the numbers of its placeholders in order, or the lengths of its ready runs of slots."""

    name: str
    image_numbers: tuple[int, ...]
    video_numbers: tuple[int, ...]
    runs: tuple[int, ...] = ()

    @property
    def images(self) -> int:
        return max(self.image_numbers, default=0)

    @property
    def videos(self) -> int:
        return max(self.video_numbers, default=0)

    def check(self, word: str, numbers: tuple[int, ...], given: int) -> None:
        """Every number has its image, and every image its number."""
        missing = sorted({number for number in numbers if number > given})
        if missing and self.runs:
            raise ValueError(f"{self.name}: holds slots of {len(self.runs)} {word}s, but got {given}.")
        if missing:
            raise ValueError(f"{self.name}: names <{word}-{missing[0]}>, but got {given} {word}(s).")
        unused = sorted(set(range(1, given + 1)) - set(numbers))
        if unused:
            raise ValueError(
                f"{self.name}: got {given} {word}(s), {len(unused)} of them without a placeholder; write "
                f"<{word}-{unused[0]}> where it belongs."
            )


def read_texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not is_list(texts) or not all(isinstance(row, str) for row in texts):
        raise ValueError(f"text: got {type(text).__name__}; expected a text or a list of texts.")
    if not texts:
        raise ValueError("text: got an empty list; a batch has at least one text.")
    return list(texts)


def video_layout(videos: Any) -> tuple[list[Any], bool]:
    """The videos in a list, and whether it is a list of lists of videos, one per text."""
    if videos is None or (is_list(videos) and not videos):
        return [], False
    if not is_list(videos) or not any(map(_is_video, videos)):
        return [videos], False
    return list(videos), any(is_list(row) and (not row or any(map(_is_video, row))) for row in videos)


def _is_video(value: Any) -> bool:
    return is_list(value) or (is_array(value) and value.ndim == 4)


def deal(name: str, layout: tuple[list[Any], bool], wanted: list[int]) -> list[list[Source]]:
    """Each text's share of the images or videos, named by where they stand in the argument."""
    given, nested = layout
    if nested:
        if len(given) != len(wanted) or not all(map(is_list, given)):
            raise ValueError(f"{name}: got {len(given)} lists for {len(wanted)} texts; expected one list per text.")
        return [[Source(f"{name}[{i}][{k}]", value) for k, value in enumerate(row)] for i, row in enumerate(given)]
    if len(given) != sum(wanted):
        raise ValueError(
            f"{name}: got {len(given)}; the placeholders of the {len(wanted)} text(s) take {sum(wanted)} "
            f"({', '.join(map(str, wanted))}). Write <{name[:-1]}-1> where the first of a text belongs."
        )
    sources = iter([Source(f"{name}[{i}]", value) for i, value in enumerate(given)])
    return [list(islice(sources, count)) for count in wanted]


def frame_captions(frames: int, rate: Any, times: Any, source: Source) -> list[str]:
    """What is written before each frame of a video; the first continues "The first video"."""
    if rate is not None and not is_number(rate):
        raise ValueError(f"fps: got {rate!r} for {source.name}; expected frames per second or None.")
    if times is not None and not (is_list(times) and len(times) == frames and all(map(is_number, times))):
        raise ValueError(f"timestamps: got {times!r} for {source.name}; expected {frames} numbers, one per frame.")
    names = [f"Frame-{i + 1}" + ("" if times is None else f"-{times[i]:.2f}s") + ": " for i in range(frames)]
    head = ": " if rate is None else f" sampled with {rate:.2f} fps: "
    return [head + names[0], *names[1:]]


def ordinal(number: int) -> str:
    if number > len(ORDINALS):
        raise ValueError(f"videos: a text names {number}; the model knows {len(ORDINALS)} in one prompt.")
    return ORDINALS[number - 1]


__all__ = ["Plan", "deal", "frame_captions", "ordinal", "read_texts", "video_layout"]
