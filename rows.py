# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""What belongs to one row: its settings, its pictures, its tokens from prompt to answer."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .configuration import WINDOW
from .decoding import Phase
from .sampling import MODEL, SamplingParameters

FIRST_PHASE = {"hybrid": Phase.MTP, "fast": Phase.MTP, "slow": Phase.AR, "verified": Phase.VERIFIED}


@dataclass(frozen=True)
class RowSettings:
    """mode: "hybrid", "fast", "slow" or "verified". limit: the row decodes while it and its prompt are shorter. least:
    tokens, prompt included, before which its end is held back. verify_labels: text in labels is accepted as in mode
    "verified". stops: ids that end the row, and its answer, wherever they are accepted."""

    mode: str
    limit: int
    sampling: SamplingParameters
    least: int = 0
    verify_labels: bool = False
    stops: frozenset[int] = frozenset()


@dataclass(eq=False)
class Picture:
    """A picture of a row, or of several: those that show equal ones share it (inputs.py's `Pictures`).

    patches: `[rows * columns, 3, P, P]`, or features of the tower `[tokens, 4 * hidden]` where `size` is None. size:
    (rows, columns) in patches. tokens: image tokens it fills.
    """

    patches: torch.Tensor
    size: tuple[int, int] | None
    tokens: int
    number: int = field(init=False, default=-1)  # what tells it from the engine's other pictures; -1 before it joins
    wanted: int = field(init=False, default=0)  # by so many rows that have yet to enter
    encoded: Any = field(init=False, default=None)  # `[tokens, hidden]`, while it is wanted

    @property
    def cost(self) -> int:
        """Patches to encode."""
        return len(self.patches) if self.size and self.encoded is None else 0

    @cached_property
    def fingerprint(self) -> tuple:
        """Equal for equal pictures. The size tells too: the same patches may lie in a wide grid or in a high one."""
        probe = self.patches.flatten()[:: max(1, self.patches.numel() // 4096)].double()
        kind = self.patches.shape, self.size, self.patches.dtype, self.patches.device
        return *kind, float(probe.sum()), float(probe.square().sum())


@dataclass(eq=False)
class Row:
    """One row from prompt to answer, and all that is known of it. `tokens` are the committed ones, prompt included.

    Args:
        index: which row of its call it is, or the id of its request. processors: the caller's, and those that
            transformers makes of a generation config. criteria: asked after every accepted token. One with a method
            `answer_to_keep`, as `DegenerateAnswerCriteria` has, is asked that for the answer's ids at each `</box>`,
            and the rest is cut. generator: draws for this row only; None is the one that all rows share.
    """

    index: int | str
    prompt: list[int]
    settings: RowSettings
    pictures: list[Picture] = field(default_factory=list)
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    streamer: BaseStreamer | None = None
    generator: torch.Generator | None = None
    cutting: list[Any] = field(init=False)
    tokens: list[int] = field(init=False)
    content: np.ndarray = field(init=False)  # what its slot is to hold before its first step (kv_cache.py)
    entered: bool = field(init=False, default=False)  # whether it does
    draft: list[int] = field(init=False, default_factory=list)  # behind the committed tokens, to be verified
    cached: int = field(init=False, default=0)  # tokens that its slot holds
    phase: Phase = field(init=False)
    forwards: int = field(init=False, default=0)
    switches: int = field(init=False, default=0)  # to next-token decoding
    accepted: list[tuple[Phase, int]] = field(init=False, default_factory=list)  # tokens of each forward
    scores: list[float] = field(init=False, default_factory=list)  # log-probabilities of the answer's tokens
    noise: list[tuple] = field(init=False, default_factory=list)  # of its next draws; its generator's state behind
    sound: torch.Tensor | None = field(init=False, default=None)  # bool, whether its images' features are finite
    # "end", "limit", "stop", "repetition", "error" or "cancelled"
    finish_reason: str | None = field(init=False, default=None)
    error: str | None = field(init=False, default=None)
    raised: Exception | None = field(init=False, default=None)  # by its processors, criteria or streamer

    def __post_init__(self):
        self.tokens, self.phase = list(self.prompt), FIRST_PHASE[self.settings.mode]
        self.cutting = [one for one in self.criteria if hasattr(one, "answer_to_keep")]
        self.criteria = StoppingCriteriaList([one for one in self.criteria if not hasattr(one, "answer_to_keep")])

    @property
    def committed(self) -> int:
        return len(self.tokens)

    @property
    def pending(self) -> list[int]:
        """What its next step feeds before the window: at most six tokens."""
        return self.tokens[self.cached :] + self.draft

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def phases(self) -> list[Phase]:
        """How each token of the answer was accepted."""
        return [phase for phase, count in self.accepted for _ in range(count)]

    @property
    def steps(self) -> list[tuple[str, int]]:
        """(mode, tokens) of each forward; the stock counts an AR step that ends its row among the MTP ones."""
        steps = [(phase.name.lower(), count) for phase, count in self.accepted]
        if self.finish_reason == "end" and steps[-1][0] == "ar":
            steps[-1] = ("mtp", steps[-1][1])
        return steps

    @property
    def room(self) -> int:
        """Cache places the row can come to need: a step from limit - 1 tokens writes a window behind them."""
        return self.settings.limit + WINDOW

    @property
    def state(self) -> list[int]:
        """Its columns of `State`, but for the order."""
        pending = (self.pending + self.tokens[:1] * WINDOW)[:WINDOW]
        flags = self.settings.mode == "hybrid", self.settings.verify_labels
        return [self.committed, self.cached, len(self.draft), self.phase, *flags, *pending]

    @property
    def idle(self) -> list[int]:
        """The same, for a pass in which it has nothing to feed."""
        return [self.committed, self.committed, 0, Phase.AR, 0, 0, *self.tokens[:1] * WINDOW]

    def features(self, start: int, stop: int) -> list[tuple[Picture, slice]]:
        """Which features of which pictures fill the image slots among places start … stop - 1 of its content."""
        shown, first = self.content < 0, 0
        begin, end = int(shown[:start].sum()), int(shown[:stop].sum())
        told = []
        for picture in self.pictures:
            part = slice(max(begin - first, 0), min(end - first, picture.tokens))
            if part.start < part.stop:
                told.append((picture, part))
            first += picture.tokens
        return told

    def cut(self, length: int) -> None:
        """Keeps `length` tokens of the answer."""
        del self.tokens[len(self.prompt) + length :], self.scores[length:]
        starts = accumulate((count for _, count in self.accepted), initial=0)
        steps = list(zip(self.accepted, starts, strict=False))
        self.accepted = [(phase, min(count, length - start)) for (phase, count), start in steps if start < length]

    def spend_noise(self, tokens: int) -> None:
        """So many positions have got their tokens; what is left is for the next ones, as long as a draft is verified.
        A row that leaves a label puts its own generator back behind what was spent: how much lay ready depends on the
        drafts, and so on whether a step was done again after running out of memory."""
        if self.phase == Phase.VERIFIED and not self.finish_reason:
            del self.noise[:tokens]
            return
        if self.generator is not None and tokens < len(self.noise):
            self.generator.set_state(self.noise[tokens - 1][1])
        self.noise = []

    def leave_memory(self) -> None:
        """Nothing of it is cached any more; what it has of its answer stays."""
        self.cached, self.draft, self.entered = 0, [], False

    def fault(self, fault: int) -> None:
        """Ends the row at a step whose numbers gave no tokens."""
        what = "the model's logits are NaN or infinite"
        if fault != MODEL:
            names = ", ".join(type(processor).__name__ for processor in self.processors)
            what = f"its logits processors ({names}) made NaN, +inf or nothing but -inf of the model's finite logits"
        what += f" at token {len(self.answer)} of its answer"
        if fault == MODEL and self.sound is not None and not self.sound:
            what += "; its image features were not finite when it entered"
        self.fail(what)

    def fail(self, what: str, raised: Any = None) -> None:
        """Ends the row; the tokens it has stay."""
        self.error, self.raised, self.finish_reason, self.noise = f"row {self.index}: {what}", raised, "error", []
