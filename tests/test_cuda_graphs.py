"""The room of CUDA graphs, as far as a CPU goes: buckets, replay from persistent buffers, falling back."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import random
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import locateanything.cuda_graphs as cuda_graphs
from locateanything.cuda_graphs import Shape
from locateanything.kv_cache import KEY_BLOCK, SlotKVCache
from tests.conftest import Batch, cases_of, model_of
from tests.pretend_device import Tape, capture_by, replayed


def shape_of(rows: int, pending: int = 6, windows: bool = True, longest: int = 100, used: float = 1.0) -> Shape:
    shape = Shape(rows, pending, windows, longest, 0, True)
    return shape._replace(cells=max(1, int(used * shape.grid)))


@given(
    shape=st.builds(
        shape_of, st.integers(1, 64), st.integers(1, 6), st.booleans(), st.integers(1, 5000), st.floats(0, 1)
    ),
    more=st.integers(0, 30),
)
def test_a_bucket_holds_the_step_and_little_more(shape, more):
    slots, capacity = shape.rows + more, shape.longest + more
    wider = cuda_graphs.bucket(shape, slots=slots, capacity=capacity)
    assert shape.rows <= wider.rows <= min(slots, 2 * shape.rows)
    assert (wider.windows, wider.decides) == (shape.windows, shape.decides)
    assert wider.pending == (1 if shape.pending == 1 and not shape.windows else 6)
    most = max(shape.longest + KEY_BLOCK - 1, shape.longest * 5 // 4 + 1)
    assert shape.longest <= wider.longest <= min(capacity, most)
    assert shape.cells <= wider.cells <= wider.grid
    if wider.grid > cuda_graphs.WORTH_PACKING:
        assert wider.cells <= max(wider.grid // 2, shape.cells + wider.grid // 4 + 1)


def test_few_shapes_occur():
    shapes = {
        cuda_graphs.bucket(shape_of(rows, longest=longest, used=used), slots=32, capacity=4096)
        for rows in range(1, 33)
        for longest in range(300, 2400, 7)
        for used in (0.1, 0.6, 1.0)
    }
    assert len(shapes) <= 12 * 20


def simulate_graphs(monkeypatch, uses: int = 1) -> list[tuple]:
    """Graphs on CPU, captured when a shape has so many uses. Returns the list of shapes captured from now on."""
    captured = []

    def capture(graphs, compute, shape):
        captured.append(shape)
        with Tape() as tape:
            result = compute(shape)
        return functools.partial(replayed, tape.operations), result

    capture_by(capture, monkeypatch, uses)
    return captured


@pytest.fixture
def captured(monkeypatch) -> list[tuple]:
    return simulate_graphs(monkeypatch)


def test_many_rows_share_few_graphs(golden, captured):
    batch = Batch(golden, random.Random(golden).sample(cases_of(golden), 40))
    output = batch.run(max_batch_rows=17)
    assert batch.answers(output) == batch.expected()
    assert 3 < len(captured) == len(set(captured)) <= 40
    assert any(shape.cells < shape.grid for shape in captured)


def test_an_empty_slot_has_nothing_to_do(captured):
    """Three rows are left, each with one token to feed, in a bucket of four: with what the finished row of the fourth
    had to feed, four tokens, the step would read behind its grid, and on CUDA end the process."""
    slow = [case for case in cases_of("shapes") if case["generation_mode"] == "slow" and "seed" not in case][:3]
    fast = next(case for case in cases_of("shapes") if case["generation_mode"] == "fast" and "seed" not in case)
    batch = Batch("shapes", [*slow, {**fast, "max_new_tokens": 1}])
    assert batch.answers(batch.run())[:3] == batch.expected()[:3]


def test_a_failed_capture_falls_back(captured, monkeypatch):
    def fails(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture_graph", fails)
    batch = Batch("shapes", cases_of("shapes")[:10])
    assert batch.answers(batch.run()) == batch.expected()


# ---- kept between calls


def batch_of(rows: int) -> Batch:
    batch = Batch("shapes", [case for case in cases_of("shapes") if "seed" not in case][:rows])
    batch.model = copy.deepcopy(batch.model)
    return batch


def test_a_shape_is_captured_once_it_has_come_often_enough_whatever_the_call(monkeypatch):
    captured = simulate_graphs(monkeypatch, uses=9)
    batch = batch_of(1)
    steps = 0
    while not captured:
        batch.run()
        steps += batch.cases[0]["forward_step"]
        assert steps < 200
    assert steps >= 9 and len(captured) < 3


def test_graphs_and_buffers_serve_the_next_call(captured):
    batch = batch_of(6)
    assert batch.answers(batch.run()) == batch.expected()
    first = list(captured)
    assert batch.answers(batch.run()) == batch.expected()
    few = batch_of(2)
    few.model = batch.model
    assert few.answers(few.run()) == few.expected()
    assert captured[: len(first)] == first and set(captured[len(first) :]).isdisjoint(first)


def test_a_larger_call_gets_larger_buffers(captured):
    batch = batch_of(2)
    batch.run(max_new_tokens=8)
    many = batch_of(9)
    many.model = batch.model
    assert many.answers(many.run()) == many.expected()


def change_weight(model):
    weight = model.get_decoder().layers[1].mlp.up_proj.weight
    weight.data = weight.data.clone()


def change_adapter(model):
    layer = model.get_decoder().layers[1].mlp.up_proj
    layer.active_adapters, layer.merged_adapters, layer.disable_adapters = ["one"], [], False
    layer.scaling = {"one": 2.0}


def change_attention(model):
    model.get_decoder().config._attn_implementation = "eager"


@pytest.mark.parametrize("change", [change_weight, change_adapter, change_attention, lambda model: model.train()])
def test_graphs_are_dropped_when_what_they_hold_has_changed(change, captured):
    batch = batch_of(2)
    batch.run()
    before = list(captured)
    change(batch.model)
    batch.run()
    assert captured == before * 2


def test_inference_mode_has_buffers_of_its_own(captured):
    batch = batch_of(4)
    with torch.inference_mode():
        batch.run()
    assert captured and batch.answers(batch.run()) == batch.expected()


def test_what_autocast_cast_is_not_kept(captured, monkeypatch):
    """Its copies of weights go when it is left."""
    batch = batch_of(2)
    enabled = torch.is_autocast_enabled
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda *device: device == ("cuda",) or enabled(*device))
        batch.run()
    assert not torch.is_autocast_enabled("cpu"), "contexts restore what they are told"
    assert captured and not cuda_graphs._kept[batch.model].graphs


def test_memory_is_kept_for_graphs_only_and_given_back(captured, monkeypatch):
    batch = batch_of(2)
    batch.run()
    kept = cuda_graphs._kept[batch.model]
    memory = weakref.ref(kept.buffers.cache)
    assert cuda_graphs.kept_bytes(batch.model) == sum(x.nbytes for x in kept.buffers.cache.layers.values()) > 0
    del kept
    batch.model.release_memory()
    assert memory() is None and not cuda_graphs._kept

    monkeypatch.setattr(cuda_graphs, "WORTH_CAPTURING", 10**6)
    batch.run()
    assert cuda_graphs._kept[batch.model].uses and not cuda_graphs.kept_bytes(batch.model)


def test_what_is_kept_goes_with_the_model(captured):
    batch = batch_of(1)
    batch.run()
    assert len(cuda_graphs._kept) == 1
    del batch
    gc.collect()
    assert not cuda_graphs._kept


def test_nothing_is_kept_on_a_cpu():
    batch = batch_of(1)
    batch.run()
    assert batch.model not in cuda_graphs._kept


def test_two_calls_at_once_have_buffers_of_their_own(captured):
    """The second starts while the first decodes, in its stopping criterion."""
    batch, inner = batch_of(2), batch_of(2)
    inner.model = batch.model
    answers = []

    def criterion(input_ids, scores):
        if not answers:
            answers.append(None)
            answers.append(inner.answers(inner.run()))
        return torch.zeros(1, dtype=torch.bool)

    assert batch.answers(batch.run(stopping_criteria=[criterion])) == batch.expected()
    assert answers[1] == inner.expected()


def test_hooks_are_not_captured(monkeypatch):
    model, device = model_of("shapes"), torch.device("cuda")
    assert cuda_graphs.capturable(model, device) and not cuda_graphs.capturable(model, torch.device("cpu"))
    handle = model.get_decoder().layers[0].register_forward_hook(lambda *args: None)
    assert not cuda_graphs.capturable(model, device)
    handle.remove()
    assert cuda_graphs.capturable(model, device)


# ---- what a capture asks of the driver


class Driver:
    """Stands in for torch.cuda and notes what is asked of it."""

    def __init__(self, monkeypatch):
        self.events, self.current = [], "main"
        driver = self

        class Stream:
            def __init__(self, device=0, name="side"):
                self.name = name

            def wait_stream(self, other):
                driver.events.append(f"{self.name} waits for {other.name}")

        class Graph:
            def pool(self):
                return "pool"

            def replay(self):
                driver.events.append("replay")

        @contextlib.contextmanager
        def on(stream):
            before, driver.current = driver.current, stream.name
            try:
                yield
            finally:
                driver.current = before

        @contextlib.contextmanager
        def capturing(graph, pool, stream, capture_error_mode):
            assert capture_error_mode == "thread_local", "another thread's work must not break it"
            assert cuda_graphs._capturing.locked(), "one at a time"
            driver.events.append(f"capture into {pool}")
            with on(stream):
                yield
            driver.events.append("captured")

        for name, stand_in in {
            "Stream": Stream,
            "current_stream": lambda: Stream(name="main"),
            "current_device": lambda: 0,
            "stream": on,
            "CUDAGraph": Graph,
            "graph": capturing,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(cuda_graphs, "_side_stream", Stream)


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "WORTH_CAPTURING", 1)
    graphs = cuda_graphs.DecodeGraphs()
    state = torch.zeros(4, 3)
    graphs.place(cuda_graphs.Buffers(SlotKVCache(4, 1024), state, state))
    return graphs


def test_a_capture_warms_up_and_happens_beside_and_shares_a_pool(graphs, monkeypatch):
    driver = Driver(monkeypatch)
    hidden = torch.arange(12.0).view(2, 3, 2)

    def compute(shape):
        driver.events.append(f"compute {shape.rows} on {driver.current}")
        return hidden[: shape.rows]

    assert torch.equal(graphs.run(compute, shape_of(1)), hidden[:1])
    warm_up = ["side waits for main", *["compute 1 on side"] * cuda_graphs.WARM_UP_STEPS]
    capture = ["capture into None", "compute 1 on side", "captured", "main waits for side"]
    assert driver.events == [*warm_up, *capture, "replay"]
    driver.events.clear()
    graphs.run(compute, shape_of(1))
    assert driver.events == ["replay"]
    graphs.run(compute, shape_of(2))
    assert "capture into pool" in driver.events
    graphs.buffers.cache.reserve(4, 2048)  # its layers have moved
    driver.events.clear()
    graphs.run(compute, shape_of(2))
    assert "capture into None" in driver.events


def test_a_failed_capture_leaves_nobody_on_its_stream(graphs, monkeypatch):
    driver = Driver(monkeypatch)

    class Invalidated:  # torch.cuda.graph ends the capture before it leaves the stream
        def __enter__(self):
            driver.current = "side"

        def __exit__(self, *error):
            raise RuntimeError("capture was invalidated")

    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: Invalidated())
    assert graphs.run(lambda shape: torch.zeros(shape.rows), shape_of(1)).shape == (1,)
    assert driver.current == "main"


def test_out_of_memory_in_a_capture_is_the_loops_to_handle(graphs, monkeypatch):
    def capture(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graphs, "capture_graph", capture)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run(lambda shape: None, shape_of(1))
    assert graphs.works
