# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Decoder attention over the slot cache: Qwen2's own attention module, with the engine's visibility.

Outside `generate` the module is transformers' Qwen2Attention to the letter. Inside, a step (kv_cache.py) says where
keys are written and who sees what; no dense prompt mask is built and K and V are never expanded to the query heads.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, apply_rotary_pos_emb

from .kv_cache import DecodeStep, PrefillStep


class WindowAttention(Qwen2Attention):
    """Qwen2Attention that, given a `step` and a `slot_cache`, attends over the latter."""

    def forward(self, hidden_states, position_embeddings, *args, step=None, slot_cache=None, **kwargs):
        """hidden_states: `[1, T, hidden]` packed if `step` is given; else everything is Qwen2Attention's own."""
        if step is None:
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        # under autocast the rotation comes out wider than the values
        query, key = query.to(value.dtype), key.to(value.dtype)
        keys, values = slot_cache.update(key, value, self.layer_idx, step)

        implementation = self.config._attn_implementation or "sdpa"
        if isinstance(step, DecodeStep):
            attended = decode_attention(query, keys, values, step, self.scaling, implementation)
        elif "flash" in implementation and not any(stretch.cached for stretch in step.stretches):
            attended = self.flash_prefill(query, key, value, step)
        else:
            attended = prefill_attention(query, keys, values, step, self.scaling, implementation)
        return self.o_proj(attended.flatten(2)), None

    def flash_prefill(self, query, key, value, step: PrefillStep) -> torch.Tensor:
        """Whole prompts in one varlen call of the flash kernel that transformers found."""
        lengths = [stretch.length for stretch in step.stretches]
        ends = torch.tensor([0, *lengths], device=query.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        attended, _ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self,
            query,
            key,
            value,
            attention_mask=None,
            dropout=0.0,
            scaling=self.scaling,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            is_causal=True,
        )
        return attended


def prefill_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: PrefillStep,
    scaling: float,
    implementation: str,
) -> torch.Tensor:
    """query: `[1, heads, T, D]`; keys, values: a layer's cache. Returns `[1, T, heads, D]`."""
    output = torch.empty_like(query.transpose(1, 2))
    for span, q, k, v, mask in step.pieces(query, keys, values):
        attended = _attend(q, k, v, mask, scaling, implementation, causal=mask is None)
        output[0, span] = attended.flatten(0, 1).transpose(0, 1)
    return output


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: DecodeStep,
    scaling: float,
    implementation: str,
) -> torch.Tensor:
    """query: `[1, heads, T, D]`; keys, values: a layer's cache. Returns `[1, T, heads, D]`.

    The query heads that share a key head are laid side by side as queries of that head, so that K and V are read as
    they lie in the cache.
    """
    rows, width = step.shape
    length = step.visible.shape[-1]
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    grid = step.to_grid(query.squeeze(0).transpose(0, 1))  # [R, Q, heads, D]
    grouped = grid.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [R, kv_heads, group, Q, D]
    group = grouped.shape[2]
    q = grouped.reshape(rows, kv_heads, group * width, head_dim)
    mask = step.mask(q.dtype, group)
    attended = _attend(q, keys[:rows, :, :length], values[:rows, :, :length], mask, scaling, implementation)
    attended = attended.unflatten(2, (group, width)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # [R, Q, heads, D]
    return step.from_grid(attended).unsqueeze(0)


def _attend(q, k, v, mask, scaling, implementation, causal=False):
    """softmax(q kᵀ · scaling) v over the last two dimensions; mask is bool or additive, or None where it is causal."""
    if implementation != "eager":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling)
    scores = (q @ k.transpose(-1, -2)).float() * scaling
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(q.dtype) @ v
