"""The kernels: the same numbers as transformers' own, in fewer of them; which are chosen where."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

import locateanything.attention as attention
from locateanything.attention import FusedRMSNorm, attend, chosen_backends, has_varlen, rotate_, rotation_tables
from locateanything.kv_cache import DecodeStep, PrefillStep, PromptChunk, SlotKVCache, State
from tests.conftest import Batch, cases_of, model_of
from tests.pretend_device import DEVICE, PretendDevice

CPU = torch.device("cpu")


# ---- Qwen2's parts, to the bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_qwen2s(dtype):
    ours, theirs = FusedRMSNorm(96, eps=1e-6).to(dtype), Qwen2RMSNorm(96, eps=1e-6).to(dtype)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    hidden = 3 * torch.randn(2, 31, 96).to(dtype)
    assert torch.equal(ours(hidden), theirs(hidden))


@pytest.mark.parametrize(
    "dtype, tables", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
def test_the_rotary_embedding_is_qwen2s(dtype, tables):
    """Also under autocast, where the tables are float32."""
    heads, kv_heads, tokens, width = 4, 2, 7, 8
    packed = torch.randn(tokens, heads + 2 * kv_heads, width).to(dtype)
    angles = torch.randn(1, tokens, width // 2).repeat(1, 1, 2)
    cos, sin = (x.to(tables or dtype) for x in (angles.cos(), angles.sin()))
    query, key, value = (x.transpose(0, 1)[None] for x in packed.clone().split([heads, kv_heads, kv_heads], 1))
    expected = [x[0].transpose(0, 1).to(dtype) for x in (*apply_rotary_pos_emb(query, key, cos, sin), value)]
    rotate_(packed, heads + kv_heads, *rotation_tables(cos, sin))
    assert torch.equal(packed, torch.cat(expected, 1))


def test_kernels_of_a_decode_step():
    """At most 24 a layer, where transformers' own parts are 43; and what is made once a step."""
    with PretendDevice() as device, torch.no_grad():
        model = device.put_model(model_of("shapes"))
        text, rows = model.config.text_config, 3
        cache = SlotKVCache(rows, 64)
        state = torch.tensor([State.empty()] * rows, device=DEVICE)

        def decode():
            step = DecodeStep(state, pending=6, windows=True, longest=40)
            return model.decode(torch.zeros(rows * 12, text.hidden_size, device=DEVICE), step, cache)

        decode()
        device.operations.clear()
        decode()
        names = [operation.name for operation in device.operations]
    layers = text.num_hidden_layers
    assert names.count("rms_norm") == 2 * layers + 1
    assert len(names) <= 24 * layers + 50
    assert sum("attention" in name for name in names) == layers


# ---- one call for sequences of different lengths


def varlen(query, key, value, bounds, starts, longest, furthest, *, scale, window_size, enable_gqa, seqused_k):
    """torch's varlen_attn as its documentation has it, sequence by sequence."""
    varlen.calls.append(len(bounds) - 1)
    assert bounds.dtype == starts.dtype == torch.int32 and window_size in ((-1, 0), (-1, -1)) and enable_gqa
    assert len(bounds) == len(starts) and (starts.diff() > 0).all()
    used = starts.diff() if seqused_k is None else seqused_k
    assert used.dtype == torch.int32 and (used <= starts.diff()).all()
    assert longest == int(bounds.diff().max()) and furthest == int(used.max())
    out = torch.empty_like(query)
    for start, stop, first, count in zip(
        *(x.tolist() for x in (bounds[:-1], bounds[1:], starts[:-1], used)), strict=True
    ):
        q, k, v = query[start:stop], key[first : first + count], value[first : first + count]
        mask = torch.ones(stop - start, count, dtype=torch.bool)
        mask = mask.tril(count - (stop - start)) if window_size == (-1, 0) else mask
        heads = [x.transpose(0, 1) for x in (q, k, v)]
        attended = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
        out[start:stop] = attended.transpose(0, 1)
    return out


@pytest.fixture
def kernel(monkeypatch):
    """The sequences of each call."""
    monkeypatch.setattr(varlen, "calls", [], raising=False)
    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "has_varlen", lambda device, dtype: True)
    return varlen.calls


def test_answers_by_the_varlen_kernel(golden, kernel):
    """Whole prompts, prompts behind a shared beginning, and pictures of several sizes."""
    batch = Batch(golden, random.Random(golden).sample(cases_of(golden), 24))
    assert batch.answers(batch.run(max_batch_rows=9)) == batch.expected()
    assert max(kernel) > 1


def test_one_call_a_layer_for_many_prompts(kernel):
    model, lengths = model_of("shapes"), [3, 9, 4, 1] * 8
    cache = SlotKVCache(32, 64)
    for chunks in (
        [PromptChunk(slot, 0, length) for slot, length in enumerate(lengths)],
        [PromptChunk(slot, length, length + 5) for slot, length in enumerate(lengths)],
    ):
        kernel.clear()
        step = PrefillStep(chunks, CPU)
        with torch.no_grad():
            model.decode(torch.randn(sum(step.lengths), model.config.text_config.hidden_size), step, cache)
        assert kernel == [32] * model.config.text_config.num_hidden_layers


def test_one_call_a_layer_for_many_images(kernel):
    tower, sizes = model_of("shapes").vision_model, [(2, 4), (6, 2), (4, 4), (2, 2)] * 16
    patches = torch.randn(sum(h * w for h, w in sizes), 3, 14, 14)
    with torch.no_grad():
        packed = tower(patches, sizes)
        assert kernel == [64] * tower.config.num_hidden_layers
        for image, size, feature in zip(patches.split([h * w for h, w in sizes]), sizes[:8], packed, strict=False):
            torch.testing.assert_close(feature, tower(image, [size])[0], atol=1e-5, rtol=1e-5)


def test_the_tower_trains_the_same_with_and_without(kernel, monkeypatch):
    """torch's kernel has gradients of its own; those of the stand-in are SDPA's."""
    tower, sizes = model_of("shapes").vision_model, [(2, 4), (2, 2), (4, 2)]
    patches = torch.randn(20, 3, 14, 14)
    gradients = []
    for there in (True, False):
        monkeypatch.setattr(attention, "has_varlen", lambda *place, there=there: there)
        pixels = patches.clone().requires_grad_()
        sum(feature.square().sum() for feature in tower(pixels, sizes)).backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_where_the_varlen_kernel_is(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index else (7, 5))
    attention._varlen_on.cache_clear()
    new, old = torch.device("cuda", 1), torch.device("cuda", 0)
    known = attention.varlen_attn is not None
    assert has_varlen(new, torch.bfloat16) == has_varlen(new, torch.float16) == known
    assert not has_varlen(new, torch.float32) and not has_varlen(old, torch.bfloat16)
    assert not has_varlen(CPU, torch.bfloat16)
    attention._varlen_on.cache_clear()
    for another in (None, lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None):  # of older torch
        monkeypatch.setattr(attention, "varlen_attn", another)
        attention._varlen_on.cache_clear()
        assert not has_varlen(new, torch.bfloat16)
    attention._varlen_on.cache_clear()


# ---- what is chosen


def test_cudnn_builds_no_plan_for_every_shape():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with chosen_backends(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with chosen_backends(CPU):
        assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_keys_under_a_mask_are_aligned_on_an_accelerator():
    """And on a CPU as long as they are: to the bit what the whole prompt gives."""
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), scaling=0.5)
    layer, query = torch.randn(2, 129, 2, 2, 8), torch.randn(7, 4, 8)
    step = PrefillStep([PromptChunk(1, 30, 37)], CPU)
    expected = step.attend(module, query, layer[1, 30:37], layer)
    with PretendDevice() as device:
        step = PrefillStep([PromptChunk(1, 30, 37)], DEVICE)
        layer = layer.to(DEVICE)
        attended = step.attend(module, query.to(DEVICE), layer[1, 30:37], layer)
        (call,) = (operation for operation in device.operations if "attention" in operation.name)
        assert {shape[-2] for shape, *_ in call.tensors[1:3]} == {64} and call.tensors[3][0][-1] == 64
        torch.testing.assert_close(attended.cpu(), expected)


def test_an_unknown_implementation_is_refused():
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="paged"))
    with pytest.raises(ValueError, match="attn_implementation='paged'"):
        attend(module, *torch.randn(3, 1, 1, 2, 4), scaling=1.0, causal=False)
