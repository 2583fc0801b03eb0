# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Samples side by side in one pass of the decoder, without padding: attention inside each, and the loss."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from training.objective import IGNORED, Marks, Sample, places_of, sees

LOSS_ROWS = 1024  # logits of so many places at a time: 0.6 MB each at the 3B model's vocabulary
PARTS = ("causal", "window", "coordinates", "null")


@dataclass
class TrainingOutput(ModelOutput):
    """loss: the mean over all targets. parts: `[4, 2]` float32, for each of `PARTS` the sum of its targets' losses
    and how many there are."""

    loss: torch.Tensor | None = None
    parts: torch.Tensor | None = None


class Pack:
    """Who sees whom in a training pass, as the decoder's layers ask it; `forward(windows=pack)` runs it.

    flex: attend by FlexAttention, compiled, in one call; otherwise by two of SDPA for each sample, which is as exact:
    the causal part, which never sees a window, then the windows.
    """

    def __init__(self, samples: Sequence[Sample], marks: Marks, flex: bool = False):
        self.marks, self.flex, self.places = marks, flex, places_of(samples)
        self.lengths = [length for sample in samples for length in (sample.length, len(sample.ids) - sample.length)]
        self._masks: Any = None

    def to(self, device: Any, **kwargs: Any) -> "Pack":
        """accelerate calls this, once for the batch and before each layer, which may live on another device."""
        if self.places.device == torch.device(device):
            return self
        moved = copy(self)
        moved.places, moved._masks = self.places.to(device, **kwargs), None
        return moved

    def attend(self, query, keys, values, scaling: float) -> torch.Tensor:
        """query: `[1, heads, T, D]`; keys, values: `[1, kv_heads, T, D]`. Returns `[1, T, heads, D]`."""
        if self.flex:
            if self._masks is None:
                places = self.places.shape[1]
                self._masks = create_block_mask(self.asked(), None, None, places, places, query.device)
            told = {"block_mask": self._masks, "scale": scaling, "enable_gqa": True, "training": query.requires_grad}
            return compile_friendly_flex_attention(query, keys, values, **told).transpose(1, 2)
        if self._masks is None:
            parts = self.places.split(self.lengths, 1)
            pairs = zip(parts[::2], parts[1::2], strict=True)
            self._masks = [sees(own[..., None], torch.cat([said, own], 1)[:, None]) for said, own in pairs]
        query = query.squeeze(0).unflatten(0, (keys.shape[1], -1))  # [kv_heads, group, T, D]
        # expanded, not copied, to the query heads
        keys, values = (x.squeeze(0).unsqueeze(1).expand(-1, query.shape[1], -1, -1) for x in (keys, values))
        attended, start = [], 0
        for mask, length in zip(self._masks, self.lengths[::2], strict=True):
            middle, stop = start + length, start + length + len(mask)
            q, k, v = (x[:, :, start:middle] for x in (query, keys, values))
            attended.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
            if len(mask):
                q, k, v = query[:, :, middle:stop], keys[:, :, start:stop], values[:, :, start:stop]
                attended.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
            start = stop
        return torch.cat(attended, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)

    def asked(self) -> Callable[..., torch.Tensor]:
        """`sees`, as FlexAttention asks it."""
        rows = tuple(self.places)
        return lambda batch, head, q, k: sees([row[q] for row in rows], [row[k] for row in rows])

    def run(self, model: Any, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        """model: the language model. labels: `[1, T]` long, aligned. inputs: its ids or embeddings, and positions.
        Returns a `TrainingOutput`, or without labels the logits of all places, `[1, T, vocabulary]`."""
        kept = {name: inputs.get(name) for name in ("input_ids", "inputs_embeds", "position_ids")}
        # a dict is transformers' way of saying that masks are made already
        told = {"attention_mask": {"full_attention": None}, "use_cache": False, "windows": self}
        hidden, head = model.model(**kept, **told).last_hidden_state, model.get_output_embeddings()
        if labels is None:
            return CausalLMOutputWithPast(logits=head(hidden))
        targets = labels.flatten().to(hidden.device)
        told_at = (targets != IGNORED).nonzero().squeeze(1)
        targets, rows = targets[told_at], hidden[0, told_at]
        chunks = zip(rows.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        losses = torch.cat([checkpoint(cross_entropy, head, *chunk, use_reentrant=False) for chunk in chunks])
        loss = losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
        return TrainingOutput(loss, self.parts(losses.detach(), targets, told_at))

    def parts(self, losses: torch.Tensor, targets: torch.Tensor, told_at: torch.Tensor) -> torch.Tensor:
        window = self.places[1].to(losses.device)[told_at] >= 0
        coordinate = (targets >= self.marks.coord_start) & (targets <= self.marks.coord_end)
        of = torch.stack([~window, window, coordinate, targets == self.marks.null]).to(losses.dtype)
        return torch.stack([of @ losses, of.sum(1)], 1)


def cross_entropy(head: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`[rows]` float32: the loss of each row. Its logits are computed again on the way back."""
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")
