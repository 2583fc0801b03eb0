# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What of entering rows' prompts must be computed, and what another slot holds already.

Rows that ask about the same picture begin alike: system turn, image, often the first words. Whatever of it a slot
holds is copied, and only the rest is computed. Pure planning: no model, no cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

# A copy also costs a pass of its own for the rest, so little is not worth sharing.
WORTH_TOKENS = 16
WORTH_SHARE = 0.25


@dataclass(frozen=True)
class Entry:
    """A row about to enter `slot`: its first `shared` tokens are copied from slot `donor` (-1: nothing is).

    `length` tokens are cached when it has entered.
    """

    slot: int
    length: int
    shared: int = 0
    donor: int = -1


def content_of(tokens: list[int], image_token: int, images: list[int], lengths: list[int]) -> np.ndarray:
    """`[n]` int64 that is equal where two rows are: token ids, image slots replaced by which image they show.

    Args:
        images: identity of each of the row's images, in order. lengths: image tokens of each.
    """
    content = np.asarray(tokens, dtype=np.int64)
    shown = np.repeat(-1 - np.asarray(images, dtype=np.int64), lengths)
    # an answer that is cached again may hold the image token as a mere word
    content[np.flatnonzero(content == image_token)[: len(shown)]] = shown
    return content


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many elements two arrays share from the start."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length


def plan(entering: Mapping[int, np.ndarray], residents: Mapping[int, np.ndarray]) -> tuple[list[Entry], list[Entry]]:
    """Splits entering rows into those computed whole and those that share.

    Args:
        entering: contents of the tokens to be cached, by slot. residents: contents that slots hold now, a slot's
            last row included after it has left.

    Returns:
        (first, second): rows of `second` copy from slots that hold the donor's content once `first` is computed.
    """
    first: list[Entry] = []
    second: list[Entry] = []
    # a resident's slot that somebody enters is overwritten, so it can give to that slot only
    staying = {slot: content for slot, content in residents.items() if slot not in entering}
    computed: dict[int, np.ndarray] = {}
    for slot, content in entering.items():
        donors = {**staying, **computed}
        if slot in residents:
            donors[slot] = residents[slot]
        shared, donor = max(((common_prefix(content, held), giver) for giver, held in donors.items()), default=(0, -1))
        if shared >= WORTH_TOKENS and shared >= WORTH_SHARE * len(content):
            second.append(Entry(slot, len(content), shared, donor))
            if donor == slot:
                computed[slot] = content[:shared]  # stays where it is, so others may copy it too
        else:
            first.append(Entry(slot, len(content)))
            computed[slot] = content
    return first, second


def in_passes(entries: list[Entry], budget: int) -> Iterator[list[Entry]]:
    """Entries in groups of at most `budget` tokens to compute, one entry at least."""
    group: list[Entry] = []
    tokens = 0
    for entry in entries:
        new = entry.length - entry.shared
        if group and tokens + new > budget:
            yield group
            group, tokens = [], 0
        group.append(entry)
        tokens += new
    if group:
        yield group
