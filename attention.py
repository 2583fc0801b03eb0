# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Attention: which kernels there are here and which of them is used, and Qwen2's parts on few of them.

A pass is packed: its tokens, of all rows or images, lie side by side. Where a kernel takes sequences of different
lengths in one call (`attend_packed`), that is what runs; elsewhere sequences go one by one, or stacked where they are
equally long (`attend`).
"""

import contextlib
import functools
import inspect
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RMSNorm, apply_rotary_pos_emb

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's own varlen kernel (FlashAttention) runs there, and knows of sequences with room behind them."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and _varlen_on(device)


@functools.cache
def _varlen_on(device: torch.device) -> bool:
    if varlen_attn is None or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return "seqused_k" in inspect.signature(varlen_attn).parameters


def chosen_backends(device: torch.device) -> contextlib.AbstractContextManager:
    """For a pass: SDPA without cuDNN, which builds a plan for every new shape, tens of milliseconds each."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Sequences:
    """Sequences that lie side by side.

    Attributes:
        lengths: of each. longest: of them. bounds: `[n + 1]` int32, where each begins, and the last ends.
    """

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths, self.longest = lengths, max(lengths)
        self.bounds = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=device)

    def to(self, device: torch.device, **kwargs) -> "Sequences":
        """accelerate calls this before each layer, which may live on another device."""
        return self if device == self.bounds.device else Sequences(self.lengths, device)


@dataclass(frozen=True)
class Places:
    """Where in a cache the keys of each sequence lie: `used` of them, `[n]` int32, at most `longest`, from `starts`,
    `[n + 1]` int32, on."""

    starts: torch.Tensor
    used: torch.Tensor
    longest: int


def attend_packed(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: Sequences,
    *,
    scaling: float,
    causal: bool,
    places: Places | None = None,
) -> torch.Tensor | None:
    """Attention inside each sequence in one call; None where no kernel does that.

    Args:
        module: whose `config` names the implementation. query: `[T, heads, D]`. key, value: `[T, kv_heads, D]`, or
            with `places` `[all places, kv_heads, D]` of a cache, whose last keys are the queries' own.

    Returns:
        `[T, heads, D]`.
    """
    implementation = module.config._attn_implementation or "sdpa"
    if "flash" in implementation and places is None:
        # the varlen call of the flash kernel that transformers found
        bounds = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), sequences.bounds)
        longest = dict.fromkeys(("max_length_q", "max_length_k"), sequences.longest)
        flash = ALL_ATTENTION_FUNCTIONS[implementation]
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        return flash(module, q, k, v, None, scaling=scaling, is_causal=causal, **bounds, **longest)[0].squeeze(0)
    if implementation != "sdpa" or not has_varlen(query.device, query.dtype):
        return None
    return varlen_attn(
        *(query, key, value, sequences.bounds),
        places.starts if places else sequences.bounds,
        *(sequences.longest, places.longest if places else sequences.longest),
        scale=scaling,
        window_size=(-1, 0 if causal else -1),
        enable_gqa=True,
        seqused_k=places.used if places else None,
    )


def attend(module: Any, query, key, value, *, scaling: float, causal: bool, mask: torch.Tensor | None = None):
    """softmax(q kᵀ · scaling) v over the last two dimensions. mask: bool or additive.

    Raises:
        ValueError: an attention implementation that there is not.
    """
    implementation = module.config._attn_implementation or "sdpa"
    if implementation == "sdpa" or "flash" in implementation:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling)
    if implementation != "eager":
        raise ValueError(f"attn_implementation={implementation!r}: there are sdpa, eager and flash kernels.")
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(query.dtype) @ value


# ---- Qwen2


class FusedRMSNorm(Qwen2RMSNorm):
    """Qwen2RMSNorm in two kernels instead of eight, with its roundings: the weight comes after the cast."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * F.rms_norm(hidden_states, self.weight.shape, eps=self.variance_epsilon)


def rotation_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' `[1, T, D]` each → `[T, 1, D]`, for `rotate_`, the first half of the sines with its sign."""
    half = sin.shape[-1] // 2
    return cos[0, :, None], torch.cat((-sin[..., :half], sin[..., half:]), -1)[0, :, None]


def rotate_(x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding of the first heads of `[T, all heads, D]`, in place: apply_rotary_pos_emb's numbers to the bit,
    for queries and keys at once. Under autocast the tables are wider than `x`."""
    turned = x.roll(x.shape[-1] // 2, -1)[:, :heads]
    x = x[:, :heads]
    torch.add(x * cos, turned * sin, out=x)


class WindowAttention(Qwen2Attention):
    """Qwen2Attention that, given a `step` and a `slot_cache`, attends over the latter, and given `windows` as these
    say (training/pack.py of the repository); else transformers' own."""

    def forward(self, hidden_states, position_embeddings, *args, step=None, slot_cache=None, windows=None, **kwargs):
        """hidden_states: `[1, T, hidden]` packed if `step` is given; else everything is Qwen2Attention's."""
        if windows is not None:  # a pass with gradients: nothing in place, nothing kept
            parts = [linear(hidden_states) for linear in (self.q_proj, self.k_proj, self.v_proj)]
            query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            attended = windows.attend(query.to(value.dtype), key.to(value.dtype), value, self.scaling)
            return self.o_proj(attended.flatten(2)), None
        if step is None:
            return super().forward(hidden_states, position_embeddings, *args, **kwargs)
        return self.attend_slots(hidden_states, position_embeddings, step, slot_cache), None

    @torch.compiler.disable  # torch.compile would trace it anew for every layer, whose cache is another
    def attend_slots(self, hidden_states, position_embeddings, step, slot_cache) -> torch.Tensor:
        projected = [linear(hidden_states[0]) for linear in (self.q_proj, self.k_proj, self.v_proj)]
        packed = torch.cat(projected, -1).unflatten(-1, (-1, self.head_dim))  # [T, heads + 2 * kv_heads, D]
        heads = projected[0].shape[-1] // self.head_dim
        kv_heads = projected[1].shape[-1] // self.head_dim
        rotate_(packed, heads + kv_heads, *step.rotations(position_embeddings))
        query, keys_values = packed[:, :heads], packed[:, heads:].unflatten(1, (2, kv_heads))
        layer = slot_cache.update(keys_values, self.layer_idx, step)
        return self.o_proj(step.attend(self, query, keys_values, layer).flatten(1)).unsqueeze(0)


def replace_parts(decoder: Any) -> None:
    """Puts these norms and this attention where a Qwen2Model has its own."""
    norm = functools.partial(FusedRMSNorm, decoder.config.hidden_size, decoder.config.rms_norm_eps)
    decoder.norm = norm()
    for index, layer in enumerate(decoder.layers):
        layer.input_layernorm, layer.post_attention_layernorm = norm(), norm()
        layer.self_attn = WindowAttention(decoder.config, index)
