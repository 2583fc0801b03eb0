"""Faults at any place: a right answer or a clear error, never a wrong one; and the model goes on as before."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import locateanything.generation as generation
import locateanything.model_runner as model_runner
import locateanything.sampling as sampling
from benchmarks import load
from benchmarks.common import resident
from locateanything.kv_cache import SlotKVCache
from tests.conftest import Batch, cases_of, model_of, processor_of
from tests.test_training import checkpointing

MODES = ["hybrid", "slow", "fast", "verified"]


def batch_of(rows: int, seed: int = 0, new: int = 8, **settings) -> Batch:
    """Rows of all modes, some of one picture, every other one sampled, whose answers are not recorded."""
    rng = random.Random(seed)
    cases = [
        {**case, "generation_mode": MODES[row % 4], "temperature": 0.9 * (row % 2), "seed": row, "max_new_tokens": new}
        for row, case in enumerate(rng.choices([case for case in cases_of("shapes") if "seed" not in case], k=rows))
    ]
    return Batch("shapes", [{**case, **settings} for case in cases])


def alone(batch: Batch) -> list[list[int]]:
    """Each row's answer when nothing else is asked and nothing fails."""
    return [strip(Batch("shapes", [case]), Batch("shapes", [case]).run())[0] for case in batch.cases]


def strip(batch: Batch, output) -> list[list[int]]:
    pad = batch.model.config.pad_token_id
    rows = getattr(output, "sequences", output)[:, batch.input_ids.shape[1] :].tolist()
    return [row[: next((i for i in range(len(row)) if set(row[i:]) == {pad}), len(row))] for row in rows]


class AtOperation(TorchDispatchMode):
    """Counts torch's operations, and raises `error` instead of the `number`th."""

    def __init__(self, number: int | None = None, error: type[BaseException] = KeyboardInterrupt):
        super().__init__()
        self.number, self.error, self.count = number, error, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            raise self.error(f"injected instead of {function}")
        return function(*args, **(kwargs or {}))


def operations(batch: Batch, **options) -> int:
    with AtOperation() as mode:
        batch.run(**options)
    return mode.count


# ---- memory runs out


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_out_of_memory_at_any_operation(monkeypatch, packed):
    """Every stage allocates: whichever operation fails, answers are right, or the error is this one."""
    if not packed:
        monkeypatch.setattr(model_runner, "packs", lambda device: False)
    batch = batch_of(5, new=6)
    expected, options = alone(batch), {"max_batch_rows": 3}
    places = operations(batch, **options)
    gone_on = 0
    for number in random.Random(int(packed)).sample(range(1, places), 10):
        try:
            with AtOperation(number, torch.OutOfMemoryError):
                output = batch.run(**options)
        except torch.OutOfMemoryError as error:
            assert "injected" in str(error)  # before the loop, or behind it
            continue
        gone_on += 1
        assert strip(batch, output) == expected, number
        assert output.row_errors == [None] * 5
    assert gone_on > 5
    assert strip(batch, batch.run()) == expected


def test_sampled_rows_draw_the_same_again(monkeypatch):
    """Between a row's draw and its acceptance, memory runs out: its generator goes back."""
    batch = batch_of(4, new=8, temperature=0.9)
    expected = alone(batch)
    runs, calls = model_runner.ModelRunner.step, []

    def short(runner, *args):
        decided = runs(runner, *args)
        calls.append(None)
        if len(calls) in (2, 4, 5):
            raise torch.OutOfMemoryError("injected")
        return decided

    monkeypatch.setattr(model_runner.ModelRunner, "step", short)
    assert strip(batch, batch.run()) == expected and len(calls) > 5


def out_of_memory_at(monkeypatch, model, number: int) -> None:
    """The model's `number`th logits do not fit."""
    calls = []

    def short(hidden_states):
        calls.append(None)
        if len(calls) == number:
            raise torch.OutOfMemoryError("injected")
        return type(model).logits(model, hidden_states)

    monkeypatch.setattr(model, "logits", short)


@pytest.mark.parametrize("mode", ["hybrid", "fast"])
def test_a_draft_lost_to_memory_changes_no_draw(monkeypatch, mode):
    """In a label, noise lies ready for as many tokens as are drafted; what follows the label draws behind its end."""
    model = model_of("shapes-early")
    settings = {"generation_mode": mode, "verify_labels": True, "temperature": 1.3, "max_new_tokens": 24}
    for seed, case in enumerate([case for case in cases_of("shapes-early") if 10 < case["num_tokens"] < 70][:6]):
        batch = Batch("shapes-early", [case])
        answers = []
        for number in (0, 2, 3, 4):
            with monkeypatch.context() as patch:
                out_of_memory_at(patch, model, number)
                generator = torch.Generator().manual_seed(seed)
                answers.append(model.generate(**batch.inputs, **settings, generator=[generator]).tolist())
        assert answers == answers[:1] * 4, seed


@pytest.mark.parametrize("number", [2, 3])
def test_rows_share_no_numbers_of_a_common_generator(monkeypatch, number):
    """Put back because memory ran out, it gives again what it gave; so what lay ready with a row must be gone."""
    draw, spend, runs = sampling.draw, generation.Row.spend_noise, model_runner.ModelRunner.step
    step, drawn, spent, calls = [], set(), set(), []

    def first(lines: torch.Tensor) -> list[tuple]:
        return [tuple(line[:6].tolist()) for line in lines.reshape(-1, lines.shape[-1])]

    def drawing(noise, probabilities):
        step.extend(first(noise) if noise.dim() == 3 else [])  # of rows that verify, noise lies ready
        return draw(noise, probabilities)

    def spending(row, tokens):
        spent.update(first(torch.cat([noise for noise, _ in row.noise[:tokens]])) if row.noise else [])
        spend(row, tokens)

    def short(runner, *args):
        decided = runs(runner, *args)
        calls.append(None)
        if len(calls) == number:
            step.clear()
            raise torch.OutOfMemoryError("injected")
        drawn.update(step)
        step.clear()
        return decided

    monkeypatch.setattr(sampling, "draw", drawing)
    monkeypatch.setattr(generation.Row, "spend_noise", spending)
    monkeypatch.setattr(model_runner.ModelRunner, "step", short)
    batch = batch_of(6)
    settings = {"generation_mode": ["slow", "verified"] * 3, "temperature": 1.2, "max_new_tokens": 40}
    batch.model.generate(**batch.inputs, **settings, generator=torch.Generator().manual_seed(5))
    assert len(calls) > number and drawn and spent and not drawn & spent


class Says(LogitsProcessor):
    """The third token of an answer to `prompt` is `token`."""

    def __init__(self, prompt: list[int], token: int):
        self.prompt, self.token = prompt, token

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == len(self.prompt) + 2 and input_ids[0, : len(self.prompt)].tolist() == self.prompt:
            scores = torch.full_like(scores, -50.0)
            scores[:, self.token] = 0
        return scores


@pytest.mark.parametrize("mode", ["slow", "verified"])
@pytest.mark.parametrize("slots", [1, 3])
def test_an_image_token_in_an_answer_is_a_word(monkeypatch, mode, slots):
    """Also where the answer is cached again, because memory ran out: its features are the prompt's."""
    cases = [case for case in cases_of("shapes") if case["generation_mode"] == "slow" and case["num_tokens"] > 12][:3]
    batch = Batch("shapes", [{**case, "generation_mode": mode} for case in cases])
    token = batch.model.config.image_token_index
    options = {"logits_processor": [Says(cases[0]["input_ids"], token)], "max_batch_rows": slots}
    expected = strip(batch, batch.run(**options))
    assert expected[0][2] == token
    for number in (4, 6):
        with monkeypatch.context() as patch:
            out_of_memory_at(patch, batch.model, number)
            assert strip(batch, batch.run(**options)) == expected


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_trains_with_checkpointing_answers(reentrant):
    """An evaluation inside a training loop: checkpointed layers drop past_key_values."""
    batch = batch_of(4)
    expected = strip(batch, batch.run())
    batch.model = copy.deepcopy(batch.model)
    checkpointing(batch.model.train(), use_reentrant=reentrant)
    assert strip(batch, batch.run()) == expected
    assert batch.model.training and batch.model.language_model.model.layers[0].gradient_checkpointing


# ---- interrupts


def test_an_interrupt_at_any_operation_leaves_a_usable_model():
    batch = batch_of(5, new=6)
    expected = strip(batch, batch.run())
    parameters = {name: (value.data_ptr(), value._version) for name, value in batch.model.named_parameters()}
    attributes, places = set(vars(batch.model)), operations(batch)
    for number in random.Random(0).sample(range(1, places), 20):
        batch = batch_of(5, new=6)
        with pytest.raises(KeyboardInterrupt), AtOperation(number):
            batch.run()
    assert {name: (value.data_ptr(), value._version) for name, value in batch.model.named_parameters()} == parameters
    assert set(vars(batch.model)) == attributes
    assert strip(batch, batch.run()) == expected
    assert torch.is_grad_enabled()


class Raises(BaseStreamer, StoppingCriteria, LogitsProcessor):
    """A streamer, criterion or processor that raises at its `number`th call."""

    def __init__(self, number: int, error: BaseException):
        self.left, self.error = number, error

    def step(self):
        self.left -= 1
        if self.left == 0:
            raise self.error

    def put(self, value):
        self.step()

    def end(self):
        self.step()

    def __call__(self, input_ids, scores, **kwargs):
        self.step()
        return False if scores is None else scores


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine"), StopIteration()])
@pytest.mark.parametrize("where", ["streamer", "stopping_criteria", "logits_processor"])
def test_what_the_callers_code_raises_arrives_as_it_is(where, error, number):
    case = next(case for case in cases_of("shapes") if case["generation_mode"] == "hybrid" and case["num_tokens"] > 20)
    batch = Batch("shapes", [case])
    raises = Raises(number, error)
    with pytest.raises(type(error)) as caught:
        batch.run(**{where: raises if where == "streamer" else [raises]})
    assert caught.value is error
    assert batch.answers(batch.run()) == batch.expected()


@pytest.mark.parametrize("mode", ["slow", "hybrid"])
@pytest.mark.parametrize("where", ["streamer", "stopping_criteria"])
def test_out_of_memory_of_the_callers_own_is_not_tried_again(where, mode):
    """The rows beside have spent their draws by then: to go on would give other answers, and tokens unheard."""
    batch = batch_of(1 if where == "streamer" else 5, new=10, temperature=0.9, generation_mode=mode)
    expected = strip(batch, batch.run())
    for number in (1, 2, 4, 7):
        error = torch.OutOfMemoryError("the caller's")
        raises = Raises(number, error)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            batch.run(**{where: raises if where == "streamer" else [raises]})
        assert caught.value is error
    assert strip(batch, batch.run()) == expected


# ---- processors that answer something else

ANSWERS = {
    "nothing": (lambda scores: None, "NoneType"),
    "one line": (lambda scores: scores[:1], r"torch.float32 \[1, 1440\]"),
    "no lines": (lambda scores: scores[0], r"torch.float32 \[1440\]"),
    "more words": (lambda scores: torch.cat([scores, scores], 1), r"torch.float32 \[6, 2880\]"),
    "fewer words": (lambda scores: scores[:, 1:], r"torch.float32 \[6, 1439\]"),
    "a batch": (lambda scores: scores[None], r"torch.float32 \[1, 6, 1440\]"),
    "whole numbers": (lambda scores: scores.long(), r"torch.int64 \[6, 1440\]"),
    "a list": (lambda scores: scores.tolist(), "list"),
}


class Answers(LogitsProcessor):
    def __init__(self, answer):
        self.answer = answer

    def __call__(self, input_ids, scores):
        return self.answer(scores)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_processor_that_returns_no_scores_is_named(name):
    batch = Batch("shapes", [case for case in cases_of("shapes") if case["generation_mode"] == "fast"][:3])
    expected = strip(batch, batch.run())
    answer, got = ANSWERS[name]
    match = rf"row 0: the logits processor Answers returned {got}; expected torch.float32 \[6, 1440\]"
    with pytest.raises(ValueError, match=match):
        batch.run(logits_processor=[Answers(answer)], temperature=0.7, top_k=5)
    assert strip(batch, batch.run()) == expected


def test_in_a_next_token_step_too():
    batch = Batch("shapes", [case for case in cases_of("shapes") if case["generation_mode"] == "slow"][:3])
    for mode in ("slow", "verified"):
        with pytest.raises(
            ValueError, match=r"returned torch.float32 \[2, 1440\]; expected torch.float32 \[1, 1440\]"
        ):
            batch.run(generation_mode=mode, logits_processor=[Answers(lambda scores: scores.repeat(2, 1))])


def test_a_processor_may_compute_in_another_precision():
    batch = batch_of(4)
    expected = batch.run().sequences
    for dtype in (torch.float64, torch.float32):
        processor = Answers(lambda scores, dtype=dtype: scores.to(dtype))
        assert torch.equal(batch.run(logits_processor=[processor]).sequences, expected)


@pytest.mark.parametrize("packed", [True, False])
def test_what_a_processor_writes_into_its_arguments_stays_there(monkeypatch, packed):
    class Scribbles(LogitsProcessor):
        def __call__(self, input_ids, scores):
            processed = scores.clone()
            input_ids.fill_(7)
            scores.fill_(3.0)
            return processed

    if not packed:
        monkeypatch.setattr(model_runner, "packs", lambda device: False)
    batch = batch_of(8)
    expected = strip(batch, batch.run())
    assert strip(batch, batch.run(logits_processor=[Scribbles()])) == expected


# ---- several calls at once


def test_threads_share_a_model():
    batches = [batch_of(6, seed) for seed in range(4)]
    expected = [strip(batch, batch.run()) for batch in batches]
    wrong: list[object] = []
    start = threading.Barrier(len(batches))

    def ask(batch, answers):
        try:
            start.wait()
            for slots in (None, 2, 3):
                if strip(batch, batch.run(max_batch_rows=slots)) != answers:
                    wrong.append(slots)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=pair) for pair in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_thread_may_fail_beside_another():
    batch, failing = batch_of(6), batch_of(6, 1)
    expected, caught = strip(batch, batch.run()), []

    def fail():
        for number in range(1, 12):
            try:
                failing.run(logits_processor=[Raises(number, RuntimeError("mine"))])
            except RuntimeError as error:
                caught.append(str(error))

    thread = threading.Thread(target=fail)
    thread.start()
    while thread.is_alive():
        assert strip(batch, batch.run()) == expected
    thread.join()
    assert caught == ["mine"] * 11


class Asks(BaseStreamer, StoppingCriteria, LogitsProcessor):
    """A streamer, criterion or processor that asks the same model something else, at every call."""

    def __init__(self, other: Batch):
        self.other, self.answers = other, []

    def put(self, value):
        self.answers.append(strip(self.other, self.other.run()))

    def end(self):
        self.put(None)

    def __call__(self, input_ids, scores, **kwargs):
        self.put(None)
        return False if scores is None else scores


@pytest.mark.parametrize("where", ["streamer", "stopping_criteria", "logits_processor"])
def test_a_callback_may_ask_the_model(where):
    outer, other = batch_of(1, 3, generation_mode="hybrid", temperature=0.0), batch_of(3, 5, new=3)
    expected, others = strip(outer, outer.run()), strip(other, other.run())
    asks = Asks(other)
    output = outer.run(**{where: asks if where == "streamer" else [asks]})
    assert strip(outer, output) == expected
    assert len(asks.answers) > 1 and all(answers == others for answers in asks.answers)


# ---- memory is given back


@pytest.fixture
def caches(monkeypatch):
    """Weak references to the caches made, and no garbage collector to hide who keeps one."""
    made: list[weakref.ref] = []
    init = SlotKVCache.__init__

    def noting(cache, *args, **kwargs):
        init(cache, *args, **kwargs)
        made.append(weakref.ref(cache))

    monkeypatch.setattr(SlotKVCache, "__init__", noting)
    gc.collect()
    gc.disable()
    yield made
    gc.enable()


def test_the_cache_goes_with_the_call(caches):
    batch = batch_of(4)
    batch.run()
    batch.run(max_batch_rows=1)
    assert len(caches) == 2 and not any(cache() for cache in caches)


def test_an_error_that_is_kept_keeps_no_cache(caches):
    """As a notebook does: the last traceback lives on, and with it every frame."""
    batch = batch_of(4)
    with pytest.raises(ValueError, match="mine") as kept:
        batch.run(logits_processor=[Raises(5, ValueError("mine"))])
    assert kept.value.__traceback__ is not None
    tensors = [layer.keys for cache in caches if cache() is not None for layer in cache().layers]
    assert not tensors


def test_calls_leave_nothing_behind():
    """A small share of benchmarks/load.py's 20,000 calls; every third fails in one way or another."""
    batch, mine = batch_of(2, new=2), ValueError("mine")

    def call(number: int) -> None:
        options = [{}, {"max_batch_rows": 1}, {"logits_processor": [Raises(2, mine)]}][number % 3]
        try:
            batch.run(**options)
        except ValueError as error:
            assert error is mine
        mine.__traceback__ = None

    for number in range(15):
        call(number)
    gc.collect()
    objects, before = len(gc.get_objects()), resident()
    for number in range(75):
        call(number)
    gc.collect()
    assert len(gc.get_objects()) - objects < 200
    assert resident() - before < 4 << 20


def test_finished_rows_hold_no_noise(monkeypatch):
    """Of a sampled draft, a row keeps what it will draw with: megabytes a row, at the 3B model's vocabulary."""
    ran: list[list] = []
    run = generation.GenerationLoop.run
    monkeypatch.setattr(generation.GenerationLoop, "run", lambda loop, rows: ran.append(rows) or run(loop, rows))
    batch_of(6, new=5, generation_mode="verified", temperature=0.9).run()
    assert len(ran[0]) == 6 and not any(row.noise for row in ran[0])


# ---- load, in small


@pytest.mark.slow
def test_many_rows_and_calls_equal_themselves_alone():
    model, processor = model_of("shapes"), processor_of("shapes")
    distinct = load.asks(model, processor, 24, seed=3)
    alone = [load.answers(model, [row])[0] for row in distinct]
    one = load.one_call(model, distinct, alone, rows=160, slots=8, seed=3)
    assert one["wrong"] == 0 and one["tokens"] > 400 and len(one["resident"]) > load.MARKS // 2
    many = load.many_calls(model, distinct, alone, calls=20, seed=3)
    assert many["wrong"] == 0 and many["rows"] > 20
    stream = load.streamed(model, distinct, alone, rows=160, slots=8, seed=3)
    assert stream["wrong"] == 0 and 0 < stream["cancelled"] < 40
    assert max(one["resident"][2:]) - one["resident"][2] < 16 << 20
