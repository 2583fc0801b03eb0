"""Slots, in-place writes, and who sees whom in a step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from locateanything.decoding import Phase
from locateanything.kv_cache import KEY_BLOCK, DecodeStep, PrefillStep, PromptChunk, SlotKVCache, State, zeros
from tests.pretend_device import DEVICE, PretendDevice

PENDING, CACHED = st.integers(1, 6), st.integers(1, 40)
# committed, cached, drafted, phase
PLAIN = st.tuples(CACHED, PENDING, st.sampled_from([Phase.MTP, Phase.AR])).map(
    lambda row: (row[0] + row[1], row[0], 0, row[2])
)
VERIFIED = st.tuples(CACHED, PENDING, st.integers(0, 5)).map(
    lambda row: (row[0] + row[1], row[0], min(row[2], 6 - row[1]), Phase.VERIFIED)
)
ROW = PLAIN | VERIFIED


def step_of(rows, packed=True, empty=0, more=0) -> DecodeStep:
    state = [State.empty() for _ in range(len(rows) + empty)]
    for line, row in zip(state, rows, strict=False):
        line[State.COMMITTED], line[State.CACHED], line[State.DRAFTED], line[State.PHASE] = row
    used = sum(n + m - c + (0 if phase == Phase.AR else 6) for n, c, m, phase in rows)
    return DecodeStep(
        torch.tensor(state),
        pending=max(n + m - c for n, c, m, _ in rows),
        windows=any(phase != Phase.AR for *_, phase in rows),
        longest=max(n + m + (0 if phase == Phase.AR else 6) for n, _, m, phase in rows),
        cells=used + more if packed else None,
    )


@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_a_step_is_decoding_md_2(rows):
    """Positions, places and visibility, row by row, as docs/stock-behaviour.md §2 and §5 say."""
    step = step_of(rows)
    fed = []  # (slot, position, place, visible keys, is mask)
    for slot, (committed, c, m, phase) in enumerate(rows):
        n = committed + m  # a draft is fed as if it were committed
        fed += [(slot, i, i, set(range(i + 1)), False) for i in range(c, n)]
        if phase != Phase.AR:
            seen = set(range(n - 1)) | set(range(n, n + 6))
            fed += [(slot, n - 1 + j, n + j, seen, j > 0) for j in range(6)]
    assert step.slots.tolist() == [slot for slot, *_ in fed]
    assert step.positions[0].tolist() == [position for _, position, *_ in fed]
    assert step.offsets.tolist() == [place for _, _, place, *_ in fed]
    assert step.masked.tolist() == [masked for *_, masked in fed]
    visible = step.from_grid(step.visible)
    assert visible.shape[-1] % KEY_BLOCK == 0
    for keys, (_, _, _, seen, _) in zip(visible, fed, strict=True):
        assert set(keys.nonzero().flatten().tolist()) == seen
    assert step.visible.any(-1).all(), "a query that sees nothing would be NaN"


@given(rows=st.lists(ROW, min_size=1, max_size=5), empty=st.integers(0, 3))
def test_a_whole_grid_feeds_the_same_tokens_among_unused_cells(rows, empty):
    packed, whole = step_of(rows), step_of(rows, packed=False, empty=empty)
    assert len(whole.kept) == whole.shape[0] * whole.shape[1]
    for name in ("slots", "offsets", "masked"):
        assert torch.equal(getattr(whole, name)[packed.kept], getattr(packed, name))
    assert torch.equal(whole.positions[0, packed.kept], packed.positions[0])
    assert torch.equal(whole.visible[: len(rows)], packed.visible)
    unused = torch.ones(len(whole.kept), dtype=torch.bool)
    unused[packed.kept] = False
    assert (whole.offsets[unused] == -1).all(), "unused cells, all those of empty slots, write to a slot's last place"


@given(rows=st.lists(ROW, min_size=1, max_size=5), empty=st.integers(0, 3), more=st.integers(0, 20))
def test_cells_beyond_the_used_ones_are_unused_ones(rows, empty, more):
    packed, padded = step_of(rows), step_of(rows, empty=empty, more=more)
    used = len(packed.kept)
    assume(used + more < padded.shape[0] * padded.shape[1])
    assert len(padded.kept) == used + more
    for name in ("kept", "slots", "offsets", "masked"):
        assert torch.equal(getattr(padded, name)[:used], getattr(packed, name))
    assert (padded.offsets[used:] == -1).all() and len(padded.kept.unique()) == len(padded.kept)


@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_grid_and_packed_are_inverse(rows):
    step = step_of(rows)
    packed = torch.randn(len(step.kept), 3)
    grid = step.to_grid(packed)
    assert grid.shape == (*step.shape, 3)
    assert torch.equal(step.from_grid(grid), packed)
    assert (grid != 0).any(-1).sum() == len(packed)


def test_the_mask_repeats_for_each_query_head_of_a_key_head():
    step = step_of([(9, 8, 0, Phase.MTP), (12, 8, 0, Phase.AR), (9, 8, 4, Phase.VERIFIED)])
    mask = step.mask(torch.float32, group=3)
    rows, width = step.shape
    assert mask.shape == (rows, 1, 3 * width, step.visible.shape[-1])
    for head in range(3):
        part = mask[:, 0, head * width : (head + 1) * width]
        assert torch.equal(part == 0, step.visible) and torch.equal(part == -torch.inf, ~step.visible)


def test_prefill_writes_and_attends_where_its_chunks_say():
    cache = SlotKVCache(slots=3, capacity=20)
    whole = PrefillStep([PromptChunk(0, 0, 4)], torch.device("cpu"))
    cache.update(torch.randn(4, 2, 2, 4), 0, whole)
    step = PrefillStep([PromptChunk(2, 0, 3), PromptChunk(0, 4, 6)], torch.device("cpu"))
    assert step.positions.tolist() == [[0, 1, 2, 4, 5]] and step.sequences.bounds.tolist() == [0, 3, 5]
    keys_values = torch.randn(5, 2, 2, 4)
    layer = cache.update(keys_values, 0, step)
    assert torch.equal(layer[2, :3], keys_values[:3]) and torch.equal(layer[0, 4:6], keys_values[3:])
    assert not layer[1].any() and not layer[2, 3:].any()
    keys, values = layer.permute(2, 0, 3, 1, 4)

    query = torch.randn(5, 6, 4)  # three query heads a key head
    for implementation in ("sdpa", "eager"):
        module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=implementation), scaling=0.5)
        attended = step.attend(module, query, keys_values, layer)
        assert attended.shape == (5, 6, 4)
        for token, (slot, seen) in enumerate([(2, 1), (2, 2), (2, 3), (0, 5), (0, 6)]):
            k, v = (x[slot, :, :seen].repeat_interleave(3, 0) for x in (keys, values))
            p = (0.5 * (k @ query[token, :, :, None]).squeeze(-1)).softmax(-1)
            torch.testing.assert_close(attended[token], (p[..., None] * v).sum(1))


def test_slots_move_and_clear():
    cache = SlotKVCache(slots=2, capacity=8)
    cache.clear(0, 0, 5)  # nothing is held yet
    cache.move(1, 0, 5)
    for layer in range(2):
        cache.update(torch.randn(5, 2, 1, 4), layer, PrefillStep([PromptChunk(1, 0, 5)], torch.device("cpu")))
    cache.move(1, 0, 4)
    for layer in cache.layers.values():
        assert torch.equal(layer[0, :4], layer[1, :4]) and not layer[0, 4:].any()
    cache.clear(1, 2, 5)
    for layer in cache.layers.values():
        assert layer[1, :2].all() and not layer[1, 2:].any()
    assert cache.are_finite([(0, 4)]) == {(0, 4): True} and cache.are_finite([]) == {}
    cache.layers[1][0, 3, 1, 0] = torch.nan
    assert cache.are_finite([(0, 3), (0, 4)]) == {(0, 3): True, (0, 4): False}


def test_a_move_and_a_clear_are_one_operation_for_all_layers():
    with PretendDevice() as device:
        cache = SlotKVCache(slots=2, capacity=8)
        for layer in range(5):
            cache.update(torch.ones(5, 2, 1, 4, device=DEVICE), layer, PrefillStep([PromptChunk(1, 0, 5)], DEVICE))
        device.operations.clear()
        cache.move(1, 0, 4)
        cache.clear(1, 2, 5)
        assert [operation.name for operation in device.operations] == [
            "_foreach_copy_.default",
            "_foreach_zero_.default",
        ]
        assert [layer[:, :6, 0, 0, 0].tolist() for layer in cache.layers.values()] == [
            [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
        ] * 5


@given(sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 400)), min_size=1, max_size=6))
def test_a_cache_grows_and_keeps_what_it_holds(sizes):
    cache, held = SlotKVCache(1, 1), {}
    for number, (slots, places) in enumerate(sizes):
        before = cache.version, cache.slots, cache.places
        cache.reserve(slots, places)
        grown = cache.slots > before[1] or cache.places > before[2]
        assert cache.slots >= slots and cache.places > places and (cache.version > before[0]) == grown
        for layer in range(2):
            held[layer, slots - 1] = torch.randn(places, 2, 2, 4)
            step = PrefillStep([PromptChunk(slots - 1, 0, places)], torch.device("cpu"))
            cache.update(held[layer, slots - 1], layer, step)
            cache.layers[layer][:, -1] = float(number)  # what cells that no row uses have written
        for (layer, slot), written in held.items():
            assert torch.equal(cache.layers[layer][slot, : len(written)], written)
    assert all(layer.shape[:2] == (cache.slots, cache.places) for layer in cache.layers.values())
    assert cache.version <= 12, "few steps"


def test_a_cache_that_grew_has_no_more_than_what_it_held():
    cache = SlotKVCache(2, 10)
    cache.update(torch.randn(10, 2, 1, 4), 0, PrefillStep([PromptChunk(1, 0, 10)], torch.device("cpu")))
    cache.layers[0][:, -1] = torch.nan  # that place becomes an ordinary one
    cache.reserve(3, 100)
    assert cache.version == 2 and cache.layers[0].isfinite().all()
    cache.reserve(3, 100)
    assert cache.version == 2


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_on_cpu_takes_memory_as_rows_write_it(dtype):
    """A row's limit, 2048 new tokens by default, is far above most answers."""
    shape = (32, 2, 4096, 128)
    before = resident()
    cache = zeros(shape, torch.empty(0, dtype=dtype))
    assert cache.shape == shape and cache.dtype == dtype and cache.is_contiguous()
    assert resident() - before < cache.numel() * cache.element_size() / 4
    assert not cache[3].any()
    cache[0, :, :5] = 1
    assert cache.sum() == 2 * 5 * 128


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
