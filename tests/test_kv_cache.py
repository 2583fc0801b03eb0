"""Slots, in-place writes, and who sees whom in a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locateanything.kv_cache import KEY_BLOCK, DecodeStep, PrefillStep, SlotKVCache, Stretch, zeros

PENDING, CACHED = st.integers(1, 6), st.integers(1, 40)
# committed, cached, drafted, autoregressive, verified
PLAIN = st.tuples(CACHED, PENDING, st.booleans()).map(lambda row: (row[0] + row[1], row[0], 0, row[2], False))
VERIFIED = st.tuples(CACHED, PENDING, st.integers(0, 5)).map(
    lambda row: (row[0] + row[1], row[0], min(row[2], 6 - row[1]), False, True)
)
ROW = PLAIN | VERIFIED


def step_of(rows, packed=True, all_lines=False) -> DecodeStep:
    committed, cached, drafted, autoregressive, verified = zip(*rows, strict=True)
    return DecodeStep(
        torch.tensor(committed),
        torch.tensor(cached),
        torch.tensor(drafted),
        torch.tensor(autoregressive),
        torch.tensor(verified),
        pending=max(n + m - c for n, c, m, _, _ in rows),
        windows=not all(autoregressive),
        longest=max(n + m + (0 if ar else 6) for n, _, m, ar, _ in rows),
        packed=packed,
        all_lines=all_lines,
    )


@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_a_step_is_decoding_md_2(rows):
    """Positions, places and visibility, row by row, as decoding.md §2 and §5 say."""
    step = step_of(rows)
    fed = []  # (slot, position, place, visible keys, is mask)
    for slot, (committed, c, m, autoregressive, _) in enumerate(rows):
        n = committed + m  # a draft is fed as if it were committed
        fed += [(slot, i, i, set(range(i + 1)), False) for i in range(c, n)]
        if not autoregressive:
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

    read = []  # (slot, position, in a window)
    for slot, (n, _, m, autoregressive, verified) in enumerate(rows):
        if autoregressive or verified:
            read += [(slot, n - 1 + j, False) for j in range(m + 1)]
        if not autoregressive:
            read += [(slot, n + m - 1 + j, True) for j in range(6)]
    ends = [n + m for n, _, m, *_ in rows]
    lines = [fed[line] for line in step.lines.tolist()]
    assert [(slot, position, place >= ends[slot]) for slot, position, place, *_ in lines] == read


@given(rows=st.lists(PLAIN, min_size=1, max_size=5))
def test_an_unpacked_step_feeds_the_same_tokens_among_unused_cells(rows):
    packed, whole = step_of(rows), step_of(rows, packed=False)
    assert len(whole.kept) == whole.shape[0] * whole.shape[1]
    for name in ("slots", "offsets", "masked"):
        assert torch.equal(getattr(whole, name)[packed.kept], getattr(packed, name))
    assert torch.equal(whole.positions[0, packed.kept], packed.positions[0])
    unused = torch.ones(len(whole.kept), dtype=torch.bool)
    unused[packed.kept] = False
    assert (whole.offsets[unused] == -1).all(), "unused cells write to a slot's last place"
    width = len(whole.lines) // len(rows)
    assert width == (1 if all(ar for *_, ar, _ in rows) else 6)
    expected = [
        line for row, (*_, ar, _) in enumerate(rows) for line in range(row * width, row * width + (1 if ar else 6))
    ]
    assert torch.equal(whole.lines[expected], packed.kept[packed.lines])


@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_an_unpacked_step_can_read_every_cell(rows):
    packed, whole = step_of(rows), step_of(rows, packed=False, all_lines=True)
    assert torch.equal(whole.lines, torch.arange(whole.shape[0] * whole.shape[1]))
    assert torch.equal(whole.visible, packed.visible)


@given(rows=st.lists(ROW, min_size=1, max_size=5))
def test_grid_and_packed_are_inverse(rows):
    step = step_of(rows)
    packed = torch.randn(len(step.kept), 3)
    grid = step.to_grid(packed)
    assert grid.shape == (*step.shape, 3)
    assert torch.equal(step.from_grid(grid), packed)
    assert (grid != 0).any(-1).sum() == len(packed)


def test_the_mask_repeats_for_each_query_head_of_a_key_head():
    step = step_of([(9, 8, 0, False, False), (12, 8, 0, True, False), (9, 8, 4, False, True)])
    mask = step.mask(torch.float32, group=3)
    rows, width = step.shape
    assert mask.shape == (rows, 1, 3 * width, step.visible.shape[-1])
    for head in range(3):
        part = mask[:, 0, head * width : (head + 1) * width]
        assert torch.equal(part == 0, step.visible) and torch.equal(part == -torch.inf, ~step.visible)


def test_prefill_writes_where_its_stretches_say():
    cache = SlotKVCache(layers=1, slots=3, capacity=20)
    step = PrefillStep([Stretch(2, 0, 3), Stretch(0, 4, 2)], torch.device("cpu"))
    assert step.positions.tolist() == [[0, 1, 2, 4, 5]]
    key = torch.randn(1, 2, 5, 4)
    keys, values = cache.update(key, -key, 0, step)
    assert torch.equal(keys[2, :, :3], key[0, :, :3]) and torch.equal(keys[0, :, 4:6], key[0, :, 3:])
    assert torch.equal(values, -keys) and (keys != 0).sum() == key.numel()

    query = torch.randn(1, 6, 5, 4)  # three query heads a key head
    pieces = list(step.pieces(query, keys, values))
    assert [(span.start, span.stop) for span, *_ in pieces] == [(0, 3), (3, 5)]
    assert pieces[0][4] is None
    assert pieces[1][4].tolist() == [[True] * 5 + [False], [True] * 6]
    assert pieces[1][2].shape == (2, 3, 6, 4) and pieces[1][2].stride(1) == 0, "expanded without a copy"


def test_slots_move_and_clear():
    cache = SlotKVCache(layers=2, slots=2, capacity=8)
    for layer in range(2):
        key = torch.randn(1, 1, 5, 4)
        cache.update(key, key, layer, PrefillStep([Stretch(1, 0, 5)], torch.device("cpu")))
    cache.move(1, 0, 4)
    for layer in cache.layers:
        assert torch.equal(layer.keys[0, :, :4], layer.keys[1, :, :4]) and not layer.keys[0, :, 4:].any()
    cache.clear(1, 2, 5)
    for layer in cache.layers:
        assert layer.keys[1, :, :2].all() and not layer.keys[1, :, 2:].any() and not layer.values[1, :, 2:].any()


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


def test_transformers_can_ask_a_cache():
    cache = SlotKVCache(layers=2, slots=3, capacity=70)
    assert cache.get_seq_length() == 0  # rows have lengths of their own
    layer = cache.layers[1]
    assert layer.get_max_cache_shape() == layer.get_max_length() == 128
    assert layer.get_mask_sizes(torch.arange(3)) == (128, 0)
