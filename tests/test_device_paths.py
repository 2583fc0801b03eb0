"""What only an accelerator runs, driven on CPU with stand-ins for the kernels and the driver, not for our code."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from transformers import modeling_flash_attention_utils as flash

from locateanything.inputs import rows_that_fit
from locateanything.kv_cache import DecodeStep, State, zeros
from tests.conftest import Batch, cases_of, model_of

# ---- the flash kernel


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """flash_attn's varlen function, `[tokens, heads, D]`, stretch by stretch."""
    varlen.calls.append(causal)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() and cu_seqlens_q[-1] == len(q) == len(k) == len(v)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    out = torch.empty_like(q)
    for start, stop in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        heads = [x[start:stop].transpose(0, 1) for x in (q, k, v)]
        attended = F.scaled_dot_product_attention(
            *heads, is_causal=causal, scale=softmax_scale, enable_gqa=heads[0].shape != heads[1].shape
        )
        out[start:stop] = attended.transpose(0, 1)
    return out


@pytest.fixture
def kernel(monkeypatch):
    """The kernel's calls, causal or not; transformers' own way to it is walked."""
    monkeypatch.setattr(varlen, "calls", [], raising=False)
    functions = {"_flash_fn": None, "_flash_varlen_fn": varlen, "_flash_with_kvcache_fn": None}
    there = {name: function for name, function in functions.items() if hasattr(flash, name)}
    loaded = (*there.values(), flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: loaded)
    for name in (*functions, "_pad_fn", "_unpad_fn", "_process_flash_kwargs_fn", "_loaded_implementation"):
        if hasattr(flash, name):
            monkeypatch.setattr(flash, name, None)
    return varlen.calls


@pytest.mark.parametrize("where", ["vision_config", "text_config"])
def test_answers_by_the_flash_kernel(golden, kernel, monkeypatch, where):
    cases = random.Random(golden).sample(cases_of(golden), 24)
    batch = Batch(golden, cases)
    config = getattr(batch.model.config, where)
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    assert batch.answers(batch.run(max_batch_rows=9)) == batch.expected()
    assert kernel and set(kernel) == {where == "text_config"}


def test_shared_prefixes_are_read_from_the_cache(kernel, monkeypatch):
    """A stretch that attends to keys of the cache is no whole prompt: SDPA takes those passes."""
    cases = [case for case in cases_of("shapes") if case["images"] == cases_of("shapes")[0]["images"]][:6]
    batch = Batch("shapes", cases)
    monkeypatch.setattr(batch.model.config.text_config, "_attn_implementation_internal", "flash_attention_2")
    assert batch.answers(batch.run()) == batch.expected()
    assert 0 < len(kernel) < 2 * batch.model.config.text_config.num_hidden_layers


# ---- memory and devices


def test_rows_that_fit_into_half_of_the_free_memory(monkeypatch):
    model, device = model_of("shapes"), torch.device("cuda")
    text = model.config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    row = 100 * 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 4

    def fit(free: int, reserved: int = 0, allocated: int = 0) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
        return rows_that_fit(model, 100, device)

    assert [fit(10 * row), fit(10 * row - 1), fit(0), fit(10**12)] == [5, 4, 1, 32]
    assert fit(4 * row, reserved=9 * row, allocated=3 * row) == 5  # what torch holds and does not use is free too
    assert rows_that_fit(model, 10**9, torch.device("cpu")) == 32


def test_a_step_follows_its_layer_to_another_device():
    step = DecodeStep(torch.tensor([State.empty()] * 2), pending=2, windows=True, longest=14)
    assert step.to(torch.device("cpu")) is step
    moved = step.to(torch.device("meta"))
    assert {getattr(moved, name).device.type for name in ("slots", "offsets", "positions", "kept")} == {"meta"}
    assert step.slots.device.type == "cpu"


def test_a_cache_off_the_cpu_is_made_there():
    made = zeros((2, 3), torch.empty(0, device="meta", dtype=torch.bfloat16))
    assert (made.device.type, made.dtype, made.shape) == ("meta", torch.bfloat16, (2, 3))
