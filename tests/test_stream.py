"""Rows come and go: whenever they join, whatever leaves beside them, each equals itself alone."""

from __future__ import annotations

import gc
import queue
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from locateanything import generation
from locateanything.continuous_batching import RequestStatus
from locateanything.generation import GenerationLoop
from locateanything.inputs import read_call
from locateanything.kv_cache import PrefillStep
from locateanything.rows import Row
from locateanything.vision import PATCHES_A_PASS
from tests.conftest import Batch, cases_of, model_of, processor_of

FOREVER = 60  # seconds that a test waits at most


def request(case: dict, **settings) -> dict:
    """A golden case as one row of what `generate` takes."""
    batch = Batch(case.get("set", "shapes"), [case])
    told = {name: values[0] for name, values in batch.settings.items()}
    return {**batch.inputs, **told, "generator": batch.generators()[0], **settings}


def row_of(case: dict, **settings) -> Row:
    told = request(case, **settings)
    told["generator"] = [told["generator"]]
    return read_call(model_of("shapes"), None, told)[1][0]


def engine_of(**options) -> GenerationLoop:
    options = {"max_batch_rows": 4, **options}
    return model_of("shapes").engine(model_of("shapes").config.text_config.max_position_embeddings, **options)


def some(count: int, seed: int = 0, **wanted) -> list[dict]:
    cases = [case for case in cases_of("shapes") if all(case[name] == value for name, value in wanted.items())]
    return random.Random(seed).choices(cases, k=count)


def check(output, case: dict) -> None:
    assert (output.generated_tokens, output.row_forwards) == (case["output_ids"], case["forward_step"]), output
    assert output.prompt_ids == case["input_ids"] and output.error is None
    assert len(output.logprobs) == len(output.accepted_by) == len(output.generated_tokens)


class Does(LogitsProcessor, StoppingCriteria):
    """Calls back at the `number`th token of an answer."""

    def __init__(self, case: dict, number: int, act):
        self.length, self.act = len(case["input_ids"]) + number, act

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.length:
            self.act()
        return scores if scores is not None else torch.zeros(len(input_ids), dtype=torch.bool)


def raising(error: Exception | None = None):
    raise error or ValueError("mine")


# ---- the engine


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@torch.no_grad()
def test_rows_that_come_and_go_equal_themselves_alone(seed):
    """Random arrivals and cancellations in all modes, under budgets so small that prompts come in pieces, and of so
    few pictures that rows begin like others that are not whole yet, or never will be."""
    rng = random.Random(seed)
    engine = engine_of(max_batch_rows=[3, 8][seed], step_tokens=[20, 300][seed], step_patches=40)
    cases, rows, cancelled, finished = rng.choices(some(8, seed), k=80), [], set(), []
    while engine.busy or len(rows) < len(cases):
        for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
            if len(rows) < len(cases):
                rows.append(row_of(cases[len(rows)]))
                engine.add(rows[-1])
        going = [row for row in rows if row.finish_reason is None]
        if going and rng.random() < 0.3:
            cancelled.add(rng.choice(going))
            engine.cancel(next(row for row in going if row in cancelled))
        if engine.busy:
            finished += engine.step()
    assert len(cancelled) > 3 and len(set(finished) | cancelled) == len(cases)
    for row, case in zip(rows, cases, strict=True):
        if row in cancelled:
            assert row.finish_reason == "cancelled" and row.answer == case["output_ids"][: len(row.answer)]
        else:
            assert (row.answer, row.forwards) == (case["output_ids"], case["forward_step"])
    engine.close()


@torch.no_grad()
def test_rows_that_decode_do_not_wait_for_long_prompts(monkeypatch):
    """A step prefills no more tokens and encodes no more patches than it may, and decodes whoever can."""
    engine = engine_of(step_tokens=16, step_patches=30)
    tokens, patches = [0], [0]
    prefill, extract = engine.runner.prefill, engine.pictures.model.extract_feature

    def counted_prefill(chunks, *args):
        tokens[-1] += sum(chunk.stop - chunk.start for chunk in chunks)
        return prefill(chunks, *args)

    def counted_extract(pixel_values, *args):
        patches[-1] += sum(map(len, pixel_values))
        return extract(pixel_values, *args)

    monkeypatch.setattr(engine.runner, "prefill", counted_prefill)
    monkeypatch.setattr(engine.pictures.model, "extract_feature", counted_extract)
    slow = row_of(next(case for case in some(50, generation_mode="slow") if case["num_tokens"] > 30))
    engine.add(slow)
    while not slow.entered:
        engine.step()
    cases = some(12, seed=5)
    for case in cases:
        engine.add(row_of(case))
    while not slow.finish_reason:
        before = slow.forwards
        tokens.append(0)
        patches.append(0)
        engine.step()
        assert slow.forwards == before + 1
    assert 0 < max(tokens[1:]) <= 16
    largest = max(int(Batch("shapes", [case]).inputs["image_grid_hws"].prod(1).max()) for case in cases)
    assert largest > 30 and 0 < max(patches[1:]) <= largest, "beside a picture that is too large comes no other"
    engine.close()


@torch.no_grad()
def test_pictures_are_taken_one_after_another(monkeypatch):
    """A row of several pictures, more than a step's patches: it enters picture by picture."""
    case = max(cases_of("shapes"), key=lambda case: len(case["images"]))
    assert len(case["images"]) > 1
    engine, passes = engine_of(step_patches=1), []
    extract = engine.pictures.model.extract_feature
    monkeypatch.setattr(
        engine.pictures.model, "extract_feature", lambda *args: passes.append(len(args[0])) or extract(*args)
    )
    row = row_of(case)
    engine.add(row)
    while engine.busy:
        engine.step()
    assert row.answer == case["output_ids"] and passes == [1] * len({picture.number for picture in row.pictures})
    engine.close()


@torch.no_grad()
def test_what_is_not_whole_is_not_shared():
    """A row waits for one that begins alike and has yet to be cached; of one that went on the way, it shares that."""
    one, other, *_ = {case["images"][0]: case for case in some(20) if len(case["images"]) == 1}.values()
    other = {**other, "input_ids": [5, *other["input_ids"]]}  # so that they have nothing in common
    (alone,) = model_of("shapes").generate_batch([request(other)]).values()
    engine = engine_of(step_patches=1)
    rows = [row_of(one), row_of(other), row_of(other)]  # the second's picture has to wait
    for row in rows:
        engine.add(row)
    engine.step()
    assert [row.entered for row in rows] == [True, False, False]
    while engine.busy:
        engine.step()
    assert [row.answer for row in rows] == [one["output_ids"], alone.generated_tokens, alone.generated_tokens]
    engine.close()

    engine = engine_of(step_tokens=30)
    gone, row = row_of(one), row_of(one)
    engine.add(gone)
    engine.step()
    assert 0 < gone.cached < len(gone.content)
    engine.cancel(gone)
    engine.add(row)
    while engine.busy:
        engine.step()
    assert row.answer == one["output_ids"]
    engine.close()


@torch.no_grad()
def test_nothing_is_left_of_rows_that_are_gone():
    """Neither their pictures nor their features; what waits shares with what is there, and is encoded once."""
    engine = engine_of()
    one = some(1)[0]
    rows = [row_of(one) for _ in range(3)]
    for row in rows:
        engine.add(row)
    assert len({id(picture) for row in rows for picture in row.pictures}) == len(one["images"])
    pictures = [weakref.ref(picture) for row in rows for picture in row.pictures]
    while engine.busy:
        engine.step()
    assert all(row.answer == one["output_ids"] for row in rows)
    assert all(picture.encoded is None and picture.wanted == 0 for row in rows for picture in row.pictures)
    del row, rows
    gc.collect()
    assert not any(picture() for picture in pictures) and not engine.pictures.seen
    engine.close()


@torch.no_grad()
def test_a_slot_that_was_moved_from_is_cleared():
    """A broken row closes a gap: what it left where it came from must not reach who enters there."""
    engine = engine_of(max_batch_rows=3)
    cases = sorted((case for case in some(99) if case["num_tokens"] > 10), key=lambda case: len(case["input_ids"]))
    first, last, second = cases[0], cases[1], cases[-1]
    broken = row_of(second)
    broken.pictures[0].patches = torch.full_like(broken.pictures[0].patches, float("nan"))
    rows = [row_of(first), row_of(first), broken]
    for row in rows:
        engine.add(row)
    for row in rows:
        while not row.entered:
            engine.admit()
            engine.enter()
    engine.cancel(rows[1])
    engine.admit()
    assert engine.active[1] is broken
    late = row_of(last)
    engine.add(late)
    while engine.busy:
        engine.step()
    assert broken.finish_reason == "error" and rows[0].answer == first["output_ids"]
    assert (late.answer, late.forwards) == (last["output_ids"], last["forward_step"])
    engine.close()


@pytest.mark.slow
@torch.no_grad()
def test_what_a_long_row_took_goes_with_it(monkeypatch):
    """So do the halves that were left after memory ran short; and the cache is no larger than rows need."""
    monkeypatch.setattr(generation, "KEPT_PLACES", 400)
    engine, (short, other) = engine_of(max_batch_rows=64), some(2)
    assert engine.slots == 64
    longer = {**short, "input_ids": short["input_ids"] + [5] * 500}
    rows = [row_of(short), row_of(longer), row_of(other)]
    most = 0
    for row in (rows[0], rows[1]):
        engine.add(row)
        while engine.busy:
            engine.step()
            most = max(most, engine.runner.cache.places)
    assert most > 500 and engine.runner.cache.slots == 0
    engine.add(rows[2])
    engine.step()
    assert engine.runner.cache.places < 500 and engine.runner.cache.slots == 1
    engine.halve(torch.OutOfMemoryError("injected"))
    assert (engine.slots, engine.pictures.patches_a_pass) == (32, PATCHES_A_PASS // 2)
    while engine.busy:
        engine.step()
    assert rows[2].answer == other["output_ids"]
    assert (engine.slots, engine.pictures.patches_a_pass) == (64, PATCHES_A_PASS)
    engine.close()


def test_what_was_halved_is_whole_again_when_all_who_wait_are_cancelled(monkeypatch):
    engine, rows = engine_of(max_batch_rows=4), [row_of(case) for case in some(2)]
    for row in rows:
        engine.add(row)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(engine.runner, "prefill", lambda *args: raising(torch.OutOfMemoryError("injected")))
        engine.step()
    assert engine.slots == 2 and not engine.active
    for row in rows:
        engine.cancel(row)
    assert engine.slots == 4


def test_each_way_of_sharing_can_be_left_out(monkeypatch):
    case = some(1)[0]
    batch = Batch("shapes", [case] * 3)
    encoded, prefilled = [], []
    extract, decode = batch.model.extract_feature, batch.model.decode

    def counted(embeddings, step, cache):
        prefilled.extend([len(embeddings)] if isinstance(step, PrefillStep) else [])
        return decode(embeddings, step, cache)

    monkeypatch.setattr(batch.model, "extract_feature", lambda *args: encoded.append(len(args[0])) or extract(*args))
    monkeypatch.setattr(batch.model, "decode", counted)
    counts = {}
    for images in (True, False):
        for prefixes in (True, False):
            encoded.clear()
            prefilled.clear()
            output = batch.run(share_images=images, share_prefixes=prefixes)
            assert batch.answers(output) == batch.expected()
            counts[images, prefixes] = sum(encoded), sum(prefilled)
    whole = len(case["input_ids"]) - 1
    assert counts[True, True] == (1, whole) and counts[True, False] == (1, 3 * whole)
    assert counts[False, False] == (3, 3 * whole) and counts[False, True][0] == 3


# ---- requests


@pytest.fixture
def manager():
    with model_of("shapes").continuous_batching_context_manager(max_batch_rows=4) as manager:
        yield manager


def test_ten_threads_add(manager):
    cases = some(30, seed=3)

    def ask(case):
        request_id = manager.add_request(**request(case))
        return manager.get_result(request_id, timeout=FOREVER)

    with ThreadPoolExecutor(10) as pool:
        for output, case in zip(pool.map(ask, cases), cases, strict=True):
            check(output, case)
            assert output.status == RequestStatus.FINISHED and output.is_finished()
            assert output.created_time <= output.lifespan[0] <= output.lifespan[1]
    assert not manager._requests and not manager._results and manager._waiting == 0


def test_nothing_is_done_behind_a_hard_stop(manager):
    """A model's process reads its stop in the engine's thread, with what was asked before and after."""
    done = []
    with manager._changed:
        manager._call_soon(lambda engine: manager.stop(block=False, hard_stop=True))
        manager._call_soon(done.append)
    manager.join(FOREVER)
    assert not manager.is_running() and not done


def test_settings_are_each_requests_own(manager):
    """Stops, criteria, limits, lists of ids; a mask; features instead of pixels."""
    case = next(case for case in some(99, generation_mode="slow") if case["num_tokens"] > 12 and "seed" not in case)
    stop = case["output_ids"][5]
    model, told = model_of("shapes"), request(case)
    pixels = {name: told.pop(name) for name in ("pixel_values", "image_grid_hws")}
    told["input_ids"], told["attention_mask"] = case["input_ids"], None
    features = model.extract_feature(**pixels)
    ways = {
        "stop": {"eos_token_id": stop},
        "limit": {"max_new_tokens": 3},
        "end": {},
    }
    ids = {
        name: manager.add_request(**{**told, **way}, request_id=name, visual_features=features)
        for name, way in ways.items()
    }
    outputs = {name: manager.get_result(request_id, FOREVER) for name, request_id in ids.items()}
    assert {name: output.finish_reason for name, output in outputs.items()} == {name: name for name in ways}
    assert outputs["stop"].generated_tokens == case["output_ids"][: case["output_ids"].index(stop) + 1]
    assert outputs["limit"].generated_tokens == case["output_ids"][:3]
    check(outputs["end"], case)


@pytest.mark.parametrize("what", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("mode", ["hybrid", "verified"])
def test_an_exception_of_the_callers_ends_its_row_only(manager, what, mode):
    case, others = some(1, seed=1, generation_mode="slow" if mode == "verified" else mode)[0], some(8, seed=2)
    first = [manager.add_request(**request(other)) for other in others[:4]]
    bad = manager.add_request(**request(case, **{what: [Does(case, 3, raising)], "generation_mode": mode}))
    then = [manager.add_request(**request(other)) for other in others[4:]]
    output = manager.get_result(bad, FOREVER)
    assert output.status == RequestStatus.FAILED and output.finish_reason == "error"
    assert "ValueError: mine" in output.error and bad in output.error
    assert output.generated_tokens == case["output_ids"][: len(output.generated_tokens)]
    for request_id, other in zip(first + then, others, strict=True):
        check(manager.get_result(request_id, FOREVER), other)


def test_bad_requests_are_refused_where_they_are_made(manager):
    case = some(1)[0]
    good = request(case)
    pixels = good["pixel_values"]
    for wrong, named in (
        ({"generation_mode": "quick"}, "generation_mode"),
        ({"temperatur": 1.0}, "temperatur"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"input_ids": torch.cat([good["input_ids"]] * 2), "attention_mask": None, "generator": None}, "image slots"),
        ({"num_return_sequences": 2, "generator": None}, "input_ids"),
        ({"pixel_values": pixels[:, :, :13]}, "pixel_values"),
        ({"pixel_values": pixels[:-1]}, "pixel_values"),
        ({"request_id": 7}, "request_id"),
        ({"generator": 3}, "generator"),
    ):
        with pytest.raises(ValueError, match=named):
            manager.add_request(**{**good, **wrong})
    manager.add_request(**good, request_id="mine")
    with pytest.raises(ValueError, match="request_id"):
        manager.add_request(**good, request_id="mine")
    check(manager.get_result("mine", FOREVER), case)


def test_the_queue_is_bounded():
    case = some(1, generation_mode="slow")[0]
    go = threading.Event()
    model = model_of("shapes")
    with model.continuous_batching_context_manager(max_batch_rows=1, max_queue_size=2) as manager:
        held = [manager.add_request(**request(case, logits_processor=[Does(case, 1, go.wait)]))]
        while manager._waiting:
            time.sleep(0.001)
        held += [manager.add_request(**request(case)) for _ in range(2)]
        with pytest.raises(queue.Full):
            manager.add_request(**request(case), block=False)
        with pytest.raises(queue.Full):
            manager.add_request(**request(case), timeout=0.01)
        threading.Timer(0.05, go.set).start()
        held.append(manager.add_request(**request(case)))  # waits
        for request_id in held:
            check(manager.get_result(request_id, FOREVER), case)


def test_cancelling(manager):
    case = next(case for case in some(99, generation_mode="slow") if case["num_tokens"] > 20)
    reached, go = threading.Event(), threading.Event()
    act = lambda: reached.set() or go.wait()  # noqa: E731
    running = manager.add_request(**request(case, stopping_criteria=[Does(case, 5, act)]))
    reached.wait(FOREVER)
    waiting = manager.add_request(**request(case))
    for request_id in (running, waiting, "nobody"):
        manager.cancel_request(request_id)
    go.set()
    output = manager.get_result(running, FOREVER)
    assert (output.finish_reason, output.status, output.error) == ("cancelled", RequestStatus.FINISHED, None)
    assert 5 <= len(output.generated_tokens) < 8
    assert output.generated_tokens == case["output_ids"][: len(output.generated_tokens)]
    assert manager.get_result(waiting, FOREVER).generated_tokens == []
    assert manager.get_result(waiting) is manager.get_result("nobody") is None
    check(manager.get_result(manager.add_request(**request(case)), FOREVER), case)


def test_streaming(manager):
    case = next(case for case in some(99, generation_mode="fast") if case["num_tokens"] > 20)
    seen = []
    request_id = manager.add_request(**request(case), streaming=True, result_handler=seen.append)
    *_, last = manager.request_id_iter(manager.add_request(**request(case), streaming=True))
    check(last, case)
    while not (seen and seen[-1].is_finished()):
        time.sleep(0.001)
    check(seen[-1], case)
    assert len(seen) >= case["forward_step"] > 2
    for output in seen[:-1]:
        length = len(output.generated_tokens)
        assert 0 < length == len(output.logprobs) and output.generated_tokens == case["output_ids"][:length]
        assert output.status == RequestStatus.DECODING and not output.is_finished()
    assert manager.get_result(request_id) is None, "what is handled is not to be fetched"


def test_handlers_may_come_late_and_may_fail(manager):
    case = some(1)[0]
    request_id = manager.add_request(**request(case))
    while manager._requests:
        time.sleep(0.001)
    late = []
    manager.register_result_handler(request_id, late.append)
    check(late[0], case)
    manager.add_request(**request(case), result_handler=lambda output: raising())
    check(manager.get_result(manager.add_request(**request(case)), FOREVER), case)


def test_a_handler_adds_the_next_requests_and_never_waits():
    """In the engine's thread nobody would make room for it."""
    case, outputs = some(1)[0], queue.SimpleQueue()

    def again(output):
        outputs.put(output)
        with pytest.raises(queue.Full):
            for _ in range(3):
                manager.add_request(**request(case), result_handler=outputs.put)
        outputs.put("full")

    with model_of("shapes").continuous_batching_context_manager(max_batch_rows=1, max_queue_size=2) as manager:
        manager.add_request(**request(case), result_handler=again)
        check(outputs.get(timeout=FOREVER), case)
        assert outputs.get(timeout=FOREVER) == "full"
        for _ in range(2):
            check(outputs.get(timeout=FOREVER), case)


def test_a_handler_that_asks_for_a_result_holds_up_nobody():
    case, told = some(1)[0], []
    with model_of("shapes").continuous_batching_context_manager(max_batch_rows=1) as manager:
        ask = lambda _: told.append(manager.get_result("later", FOREVER))  # noqa: E731
        manager.add_request(**request(case), result_handler=ask)
        check(manager.get_result(manager.add_request(**request(case, request_id="later")), FOREVER), case)
    assert told == [None]


def test_what_is_asked_for_an_answered_request_is_not_the_next_ones():
    """Cancelled or handled by a name that is free again."""
    case, handled = some(1)[0], []
    with model_of("shapes").continuous_batching_context_manager(max_batch_rows=2) as manager:
        for _ in range(2):
            manager.register_result_handler("name", handled.append)
            check(manager.get_result(manager.add_request(**request(case, request_id="name")), FOREVER), case)
        reached, go = threading.Event(), threading.Event()
        act = lambda: reached.set() or go.wait()  # noqa: E731
        manager.add_request(**request(case, stopping_criteria=[Does(case, 1, act)]))
        reached.wait(FOREVER)  # the engine does not look up before `go`
        manager.cancel_request("name")
        manager.add_request(**request(case, request_id="name"))
        go.set()
        check(manager.get_result("name", FOREVER), case)
    assert handled == []


def test_a_manager_starts_again_while_it_stops():
    case = some(1)[0]
    manager = model_of("shapes").init_continuous_batching(max_batch_rows=1)
    for _ in range(3):
        manager.start()
        manager.add_request(**request(case))
        manager.stop(block=False)
    manager.start()
    check(manager.get_result(manager.add_request(**request(case)), FOREVER), case)
    manager.stop()


def test_a_device_error_fails_all_and_hangs_nobody(monkeypatch):
    model, cases = model_of("shapes"), some(6)
    manager = model.init_continuous_batching(max_batch_rows=2, max_queue_size=9)
    with pytest.raises(RuntimeError, match="start"):
        manager.add_request(**request(cases[0]))
    manager.start()
    assert manager.is_running()
    monkeypatch.setattr(model, "logits", lambda *args: (_ for _ in ()).throw(RuntimeError("device-side assert")))
    outputs = []
    try:
        for case in cases:
            manager.add_request(**request(case))
    except RuntimeError as error:
        assert "device-side assert" in str(error.__cause__)
    outputs = list(manager)
    assert outputs and all("device-side assert" in output.error for output in outputs)
    assert not manager.is_running() and manager.get_result() is None
    with pytest.raises(RuntimeError, match="start") as refused:
        manager.add_request(**request(cases[0]))
    assert "device-side assert" in str(refused.value.__cause__)
    with pytest.raises(RuntimeError, match="device-side assert"):
        model.generate_batch([request(case) for case in cases])
    monkeypatch.undo()
    manager.start()
    check(manager.get_result(manager.add_request(**request(cases[0])), FOREVER), cases[0])
    manager.stop()


def test_memory_that_runs_short(monkeypatch, manager):
    """It goes on with half of everything; a row that does not fit alone fails alone."""
    model, cases = model_of("shapes"), some(10, seed=4)
    decode, large = model.decode, max(len(case["input_ids"]) for case in cases)
    huge = {**cases[0], "input_ids": cases[0]["input_ids"] + [5] * (large + 60)}

    def short(embeddings, step, cache):
        rows = len(set(step.slots.tolist()))
        if rows > 2 or (isinstance(step, PrefillStep) and int(step.offsets.max()) > large + 50):
            raise torch.OutOfMemoryError("injected")
        return decode(embeddings, step, cache)

    monkeypatch.setattr(model, "decode", short)
    ids = [manager.add_request(**request(case)) for case in [*cases[:5], huge, *cases[5:]]]
    outputs = [manager.get_result(request_id, FOREVER) for request_id in ids]
    failed = outputs.pop(5)
    assert failed.status == RequestStatus.FAILED and "OutOfMemoryError" in failed.error
    for output, case in zip(outputs, cases, strict=True):
        check(output, case)


def test_stopping():
    model, cases = model_of("shapes"), some(8)
    manager = model.init_continuous_batching(max_batch_rows=2)
    manager.start()
    for case in cases:
        manager.add_request(**request(case))
    manager.stop()
    assert not manager.is_running()
    for output, case in zip(sorted(manager, key=lambda output: output.created_time), cases, strict=True):
        check(output, case)
    manager.start()
    ids = [manager.add_request(**request(case)) for case in cases]
    manager.stop(hard_stop=True)
    outputs = [manager.get_result(request_id) for request_id in ids]
    assert any(output.status == RequestStatus.FAILED and "stopped" in output.error for output in outputs)
    with pytest.raises(KeyError), model.continuous_batching_context_manager() as manager:
        manager.add_request(**request(cases[0]))
        raise KeyError
    assert not manager.is_running()
    for wrong in ("max_queue_size", "prefill_tokens", "prefill_patches"):
        with pytest.raises(ValueError, match=wrong):
            model.init_continuous_batching(**{wrong: 0})


# ---- many rows


def test_generate_batch_answers_in_order():
    cases = some(30, seed=6)
    bad = request(cases[3], generation_mode="quick", request_id="bad")
    rows = [*map(request, cases[:3]), bad, *map(request, cases[4:])]
    outputs = model_of("shapes").generate_batch(rows, max_batch_rows=4, progress_bar=True)
    names = [f"row_{number}" if number != 3 else "bad" for number in range(30)]
    assert list(outputs) == names
    failed = outputs.pop("bad")
    assert failed.status == RequestStatus.FAILED and "generation_mode" in failed.error
    for output, case in zip(outputs.values(), cases[:3] + cases[4:], strict=True):
        check(output, case)
    text = model_of("shapes").generate_batch([[419, 358, 198]], max_new_tokens=4)["row_0"]
    assert text.prompt_ids == [419, 358, 198] and text.generated_tokens
    with pytest.raises(ValueError, match="request_id"):
        model_of("shapes").generate_batch([bad, bad])


def test_generate_batch_leaves_no_thread_that_holds_rows():
    """It would free tensors while the interpreter ends, which aborts the process."""

    class Slow(list):
        def __del__(self):
            time.sleep(0.3)

    rows = ({"input_ids": Slow([419, 358, 198])} for _ in range(1))
    assert len(model_of("shapes").generate_batch(rows, max_new_tokens=4)) == 1
    assert "rows" not in [thread.name for thread in threading.enumerate()]


def test_generate_batch_takes_rows_as_places_get_free():
    case, taken = some(1)[0], []

    def rows():
        for number in range(10**9):
            taken.append(number)
            yield request(case)

    outputs = model_of("shapes").generate_batch(rows(), stream=True, max_batch_rows=2, max_queue_size=2)
    for output in islice(outputs, 30):
        check(output, case)
    time.sleep(0.3)
    assert 30 <= len(taken) <= 30 + 4 * 2 + 1
    outputs.close()
    count = len(taken)
    time.sleep(0.05)
    assert len(taken) <= count + 1


def test_what_the_iterable_raises_comes_behind_the_answers():
    cases = some(3)

    def rows():
        yield from map(request, cases)
        raise KeyError("mine")

    outputs = []
    with pytest.raises(KeyError, match="mine"):
        for output in model_of("shapes").generate_batch(rows(), stream=True):
            outputs.append(output)
    assert len(outputs) == 3


def test_outputs_become_boxes():
    cases = [case for case in some(20, seed=8) if len(case["images"]) == 1][:6]
    batch, processor = Batch("shapes", cases), processor_of("shapes")
    outputs = model_of("shapes").generate_batch([request(case) for case in cases])
    sizes = [(100, 200)] * 6
    expected = processor.post_process_grounding(batch.run(output_scores=True), target_sizes=sizes, threshold=0.2)
    found = processor.post_process_grounding(list(outputs.values()), target_sizes=sizes, threshold=0.2)
    assert sum(len(row["boxes"]) for row in found)
    for one, other in zip(found, expected, strict=True):
        assert one["labels"] == other["labels"] and torch.equal(one["boxes"], other["boxes"])
        torch.testing.assert_close(one["scores"], other["scores"], atol=1e-3, rtol=1e-3)
