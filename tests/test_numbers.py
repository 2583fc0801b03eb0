"""NaN and infinity: they end the row that they come from, by name, and change nothing in its neighbours' answers."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import locateanything.kv_cache as kv_cache
import locateanything.model_runner as model_runner
from locateanything.kv_cache import DecodeStep, PrefillStep, SlotKVCache
from locateanything.model_runner import ModelRunner
from tests.conftest import Batch, cases_of, tokenizer_of

MODES = ["fast", "slow", "hybrid", "verified"]
BROKEN = [math.nan, math.inf, -math.inf]


def pictures(count: int, seed: int = 0, **settings) -> Batch:
    """Rows that each show another picture, all modes in turn."""
    cases = list({case["images"][0]: case for case in cases_of("shapes") if len(case["images"]) == 1}.values())
    plain = ("input_ids", "images", "output_ids")
    cases = [{key: case[key] for key in plain} for case in random.Random(seed).sample(cases, count)]
    modes = [{"generation_mode": MODES[row % 4], "max_new_tokens": 12, "seed": row} for row in range(count)]
    batch = Batch("shapes", [{**case, **mode, **settings} for case, mode in zip(cases, modes, strict=True)])
    batch.settings["generation_mode"] = [case["generation_mode"] for case in batch.cases]
    return batch


def by_features(batch: Batch) -> list[torch.Tensor]:
    """Has a batch come as features instead of pixels: returns them, to be broken."""
    features = batch.model.extract_feature(batch.inputs.pop("pixel_values"), batch.inputs.pop("image_grid_hws"))
    batch.inputs["visual_features"] = [feature.clone() for feature in features]
    return batch.inputs["visual_features"]


def told(batch: Batch, output, row: int) -> tuple:
    """All that is said of a row: tokens, scores to the bit, how they were accepted, forwards."""
    count = int((output.accepted_by[row] >= 0).sum())
    start = batch.input_ids.shape[1]
    scores = output.token_log_probs[row, :count].view(torch.int32).tolist()
    ids = output.sequences[row, start:].tolist()
    assert set(ids[count:]) <= {batch.model.config.pad_token_id}
    return ids[:count], scores, output.accepted_by[row, :count].tolist(), int(output.row_forwards[row])


def require_neighbours(batch: Batch, output, reference, bad: int) -> None:
    for row in range(len(batch.cases)):
        if row != bad:
            assert output.row_errors[row] is None
            assert told(batch, output, row) == told(batch, reference, row), row


def limits(batch: Batch, bad: int, tokens: int) -> list[int]:
    """So that a healthy row leaves at the step where a bad one does, and steps have the same shapes."""
    return [tokens if row == bad else limit for row, limit in enumerate(batch.settings["max_new_tokens"])]


@pytest.fixture(params=[True, False], ids=["packed", "grid"])
def layout(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(model_runner, "packs", lambda device: False)


# ---- a picture


@pytest.mark.parametrize("value, temperature", [(math.nan, 0.0), (math.inf, 0.9)])
@pytest.mark.parametrize("slots, rows", [(None, range(4)), (1, [1]), (3, [0, 6])])
def test_broken_features_end_their_row_alone(layout, value, temperature, slots, rows):
    for bad in rows:
        batch = pictures(7, bad, temperature=temperature)
        features = by_features(batch)
        options = {"output_scores": True, "max_batch_rows": slots}
        reference = batch.run(max_new_tokens=limits(batch, bad, 1), **options)
        features[bad][-1, 3] = value
        output = batch.run(**options)
        require_neighbours(batch, output, reference, bad)
        assert output.row_errors[bad] == (
            f"row {bad}: the model's logits are NaN or infinite at token 0 of its answer; its image features were not "
            "finite when it entered"
        )
        assert told(batch, output, bad) == ([], [], [], 1)


@pytest.mark.parametrize("value", BROKEN)
def test_broken_pixels_go_through_the_vision_tower_alone(layout, value):
    batch = pictures(6)
    options = {"output_scores": True, "max_batch_rows": 4}
    reference = batch.run(max_new_tokens=limits(batch, 2, 1), **options)
    grids = batch.inputs["image_grid_hws"].prod(1).tolist()
    batch.inputs["pixel_values"] = batch.inputs["pixel_values"].clone()
    batch.inputs["pixel_values"][sum(grids[:2]), 0, 5, 5] = value
    output = batch.run(**options)
    require_neighbours(batch, output, reference, 2)
    assert "image features were not finite" in output.row_errors[2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_slot_holds_nothing_of_its_last_row(layout, value, bad):
    """Limits so short that a step attends to the whole of a slot."""
    batch = pictures(6, max_new_tokens=7)
    features = by_features(batch)
    options = {"output_scores": True, "max_batch_rows": 1}
    reference = batch.run(max_new_tokens=limits(batch, bad, 1), **options)
    features[bad][:] = value
    require_neighbours(batch, batch.run(**options), reference, bad)


def begin_with(case: dict, words: int) -> dict:
    image = Batch("shapes", [case]).model.config.image_token_index
    start = [token for token in case["input_ids"] if token != image][:9]
    return {**case, "input_ids": [start[i % 9] for i in range(words)] + case["input_ids"]}


def test_cells_that_a_row_does_not_use_hold_nothing_for_the_next(monkeypatch):
    """Row 1 takes a next-token step beside a window, so cells of it are unused; rows 2 and 3 leave none unused."""
    monkeypatch.setattr(model_runner, "packs", lambda device: False)
    cases = [begin_with(case, 30) for case in pictures(4, max_new_tokens=7, generation_mode="slow").cases]
    cases[0] |= {"generation_mode": "fast", "max_new_tokens": 1}
    batch = Batch("shapes", cases)
    features = by_features(batch)
    options = {"output_scores": True, "max_batch_rows": 2}
    reference = batch.run(max_new_tokens=limits(batch, 1, 1), **options)
    features[1][:] = math.nan
    require_neighbours(batch, batch.run(**options), reference, 1)


def test_what_is_broken_is_not_shared():
    """Rows 2 and 3 enter at once: row 3 into the slot that holds its broken picture, which is computed anew; row 2
    would copy a long beginning from there, which is sound (attention takes 512 keys at a time), but there no more."""
    cases = pictures(4, max_new_tokens=6, generation_mode="slow").cases
    cases[0], cases[2] = begin_with(cases[0], 560), begin_with(cases[2], 500)
    cases[1]["max_new_tokens"] = 1
    cases[3] = dict(cases[0])
    batch = Batch("shapes", cases)
    features = by_features(batch)
    options = {"output_scores": True, "max_batch_rows": 2}
    reference = batch.run(max_new_tokens=[1, 1, 6, 1], **options)
    features[0][:] = math.nan
    features[3] = features[0]
    output = batch.run(**options)
    assert [bool(error) for error in output.row_errors] == [True, False, False, True]
    for row in (1, 2):
        assert told(batch, output, row)[0] == told(batch, reference, row)[0]
    assert torch.allclose(output.token_log_probs[2], reference.token_log_probs[2], atol=1e-4)


def test_every_row_may_be_broken():
    batch = pictures(5)
    for feature in by_features(batch):
        feature[:] = math.nan
    output = batch.run(max_batch_rows=2, output_scores=True)
    assert all(output.row_errors) and output.sequences.shape == batch.input_ids.shape


# ---- an adapter


class BrokenAdapter:
    """Makes what one row feeds to the decoder `value`, from its `step`th forward on."""

    def __init__(self, monkeypatch, model, index: int, step: int, value: float):
        self.slot = None
        run, decode = ModelRunner.step, model.decode

        def noting(runner, active):
            self.slot = next((s for s, row in active.items() if row.index == index and row.forwards >= step), None)
            return run(runner, active)

        def breaking(embeddings, fed, cache):
            if isinstance(fed, DecodeStep) and self.slot is not None:
                embeddings = embeddings.masked_fill((fed.slots == self.slot)[:, None], value)
            return decode(embeddings, fed, cache)

        monkeypatch.setattr(ModelRunner, "step", noting)
        monkeypatch.setattr(model, "decode", breaking)


@pytest.mark.parametrize("mode, step", [("slow", 0), ("slow", 5), ("verified", 2), ("fast", 1)])
@pytest.mark.parametrize("value, slots", [(math.nan, None), (math.inf, 2)])
def test_a_row_may_break_in_the_middle(monkeypatch, layout, value, slots, mode, step):
    for bad in (1, 4):
        batch = pictures(5, seed=1)
        batch.settings["generation_mode"][bad] = mode
        options = {"output_scores": True, "max_batch_rows": slots}
        whole = told(batch, batch.run(**options), bad)
        with monkeypatch.context() as patch:
            BrokenAdapter(patch, batch.model, bad, step, value)
            output = batch.run(**options)
        ids, _, _, forwards = told(batch, output, bad)
        assert forwards == step + 1 and ids == whole[0][: len(ids)]
        assert output.row_errors[bad] == (
            f"row {bad}: the model's logits are NaN or infinite at token {len(ids)} of its answer"
        )
        if mode == "slow":  # the others accept several tokens a step, so no limit makes a step the last
            assert len(ids) == step
            reference = batch.run(max_new_tokens=limits(batch, bad, step + 1), **options)
            require_neighbours(batch, output, reference, bad)
        for row in range(5):
            assert bool(output.row_errors[row]) == (row == bad)


def test_a_broken_head_is_every_rows(monkeypatch):
    batch = pictures(4, temperature=0.7)
    logits = batch.model.logits
    monkeypatch.setattr(batch.model, "logits", lambda hidden: logits(hidden) * math.nan)
    output = batch.run()
    assert all("logits are NaN or infinite at token 0 of its answer" in error for error in output.row_errors)
    assert not any("image" in error for error in output.row_errors), "the pictures are sound"


def test_minus_infinity_is_a_number(monkeypatch):
    """A head may rule out tokens."""
    batch = pictures(4)
    expected = batch.run()
    logits, unused = batch.model.logits, batch.model.config.pad_token_id
    monkeypatch.setattr(
        batch.model, "logits", lambda hidden: logits(hidden).index_fill(1, torch.tensor(unused), -math.inf)
    )
    output = batch.run()
    assert torch.equal(output.sequences, expected.sequences) and output.row_errors == [None] * 4


@pytest.mark.parametrize("recipe", [{"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 1.3}, {"temperature": 2.0}])
def test_no_recipe_hides_it(recipe):
    batch = pictures(5, temperature=recipe.get("temperature", 0.5))
    by_features(batch)[1][:] = math.nan
    output = batch.run(**recipe)
    assert [bool(error) for error in output.row_errors] == [False, True, False, False, False]


def test_multinomial_is_not_asked(monkeypatch):
    """It refuses a whole batch, and asks the device first."""
    monkeypatch.delattr(torch, "multinomial")
    batch = pictures(4, temperature=1.0)
    batch.run()


# ---- a processor


class Breaks(LogitsProcessor):
    """Returns `value` for the rows whose prompt begins as told, once the answer has `after` tokens."""

    def __init__(self, prompt: list[int], value: float, after: int, places=slice(None)):
        self.prompt, self.value, self.after, self.places = prompt, value, after, places

    def __call__(self, input_ids, scores):
        own = input_ids[0, : len(self.prompt)].tolist() == self.prompt
        if own and input_ids.shape[1] >= len(self.prompt) + self.after:
            scores[:, self.places] = self.value  # in place, as some do
        return scores


@pytest.mark.parametrize(
    "value, places, temperature",
    [(math.nan, slice(3, 4), 0.0), (math.inf, slice(3, 5), 0.8), (-math.inf, slice(None), 0.0)],
)
@pytest.mark.parametrize("bad", range(4))
def test_a_processors_row_is_named(layout, value, places, bad, temperature):
    batch = pictures(4, 1, temperature=temperature)
    prompt = batch.cases[bad]["input_ids"]
    fine = batch.run(logits_processor=[Breaks(prompt, 0.0, 1000)], output_scores=True)
    output = batch.run(logits_processor=[Breaks(prompt, value, 2, places)], output_scores=True)
    for row in range(4):
        if row != bad:
            assert output.row_errors[row] is None
            assert told(batch, output, row)[0] == told(batch, fine, row)[0]
    ids = told(batch, output, bad)[0]
    assert output.row_errors[bad] == (
        f"row {bad}: its logits processors (Breaks) made NaN, +inf or nothing but -inf of the model's finite logits "
        f"at token {len(ids)} of its answer"
    )
    assert len(ids) >= 2 and ids == told(batch, fine, bad)[0][: len(ids)]
    # of a draft, exactly what next-token decoding accepts before it meets the fault
    assert len(ids) == 2 or MODES[bad] in ("fast", "hybrid")


def test_a_processor_does_not_hide_the_models_fault():
    batch = pictures(3)
    by_features(batch)[1][:] = math.nan
    output = batch.run(remove_invalid_values=True)
    assert "the model's logits are NaN" in output.row_errors[1] and "image features" in output.row_errors[1]
    assert output.row_errors[0] is output.row_errors[2] is None


# ---- what the caller gets


@pytest.fixture
def warned(monkeypatch):
    said = []
    logger = logging.get_logger("locateanything.modeling_locateanything_batched")
    monkeypatch.setattr(logger, "warning", said.append)
    return said


def test_without_a_dict_a_warning_names_the_rows_once(warned):
    batch = pictures(6)
    features = by_features(batch)
    features[1][:] = features[4][:] = math.nan
    expected = batch.run().sequences
    assert not warned, "row_errors says it"
    sequences = batch.run(return_dict_in_generate=False)
    assert torch.equal(sequences, expected)
    assert len(warned) == 1 and "row 1: " in warned[0] and "row 4: " in warned[0] and "row 0" not in warned[0]


@pytest.mark.parametrize("verbose", [True, False])
def test_with_a_tokenizer_too(warned, verbose):
    batch = pictures(3)
    by_features(batch)[1][:] = math.nan
    answer = batch.run(tokenizer=tokenizer_of("shapes"), verbose=verbose)
    texts = answer[0] if verbose else answer
    assert texts[1] == "" and texts[0] and texts[2]
    assert len(warned) == 1 and "row 1: " in warned[0]
    if verbose:
        assert [len(history) for history in answer[1]][1] == 1 and answer[1][1][0][1] == ""


def test_a_streamer_comes_to_its_end():
    class Notes(BaseStreamer):
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.ended = True

    batch = pictures(1)
    by_features(batch)[0][:] = math.nan
    notes = Notes()
    batch.run(streamer=notes)
    assert notes.got == [batch.cases[0]["input_ids"]] and notes.ended


def test_no_errors_are_told_of_sound_rows(golden, warned):
    batch = Batch(golden, cases_of(golden)[::18])
    output = batch.run()
    assert output.row_errors == [None] * len(batch.cases)
    batch.run(return_dict_in_generate=False)
    assert not warned


# ---- poison where nobody may look


def poison_ids(batch: Batch) -> list[int]:
    config = batch.model.config
    roles = config.token_roles
    return [config.image_token_index, roles.end, roles.null, roles.box_start, roles.mask, 0, config.pad_token_id]


def test_the_content_of_padding_cannot_matter(layout):
    batch = pictures(9, temperature=0.6, repetition_penalty=1.3)
    width = batch.input_ids.shape[1] + 7
    rows = [case["input_ids"] for case in batch.cases]
    told_of = []
    for poison in [*poison_ids(batch), None]:
        ids = torch.full((9, width), poison or 0)
        if poison is None:
            ids = torch.randint(0, batch.model.config.text_config.vocab_size, (9, width))
        mask = torch.zeros(9, width, dtype=torch.long)
        for row, own in enumerate(rows):
            ids[row, width - len(own) :], mask[row, width - len(own) :] = torch.tensor(own), 1
        batch.inputs |= {"input_ids": ids, "attention_mask": mask}
        output = batch.run(output_scores=True)
        told_of.append((output.sequences[:, width:].tolist(), output.token_log_probs.view(torch.int32).tolist()))
    assert all(one == told_of[0] for one in told_of)


@pytest.mark.parametrize("slots", [None, 2])
def test_the_content_of_unused_places_cannot_matter(monkeypatch, layout, slots):
    """Keys and values of nobody: a cache that is full of numbers, and slots that are not cleared but filled."""
    batch = pictures(8, temperature=0.6)
    expected = batch.run(output_scores=True, max_batch_rows=slots)

    def clear(cache, slot, start, stop):
        for layer in cache.layers.values() if start < stop else ():
            layer[slot, start:stop].normal_()

    monkeypatch.setattr(kv_cache, "zeros", lambda shape, like: torch.randn(shape, dtype=like.dtype))
    monkeypatch.setattr(SlotKVCache, "clear", clear)
    output = batch.run(output_scores=True, max_batch_rows=slots)
    for row in range(8):
        assert told(batch, output, row) == told(batch, expected, row)


def test_nothing_but_its_own_reaches_a_row_in_prefill(monkeypatch):
    """What a prefill pass computes for one row is the same, to the bit, beside NaN."""
    batch = pictures(4)
    features = by_features(batch)
    seen: list[dict[int, torch.Tensor]] = []
    decode = batch.model.decode

    def noting(embeddings, step, cache):
        hidden = decode(embeddings, step, cache)
        if isinstance(step, PrefillStep):
            seen.append({slot: hidden[step.slots == slot] for slot in set(step.slots.tolist())})
        return hidden

    monkeypatch.setattr(batch.model, "decode", noting)
    batch.run(max_new_tokens=1)
    sound, seen[:] = list(seen), []
    features[2][:] = math.nan
    batch.run(max_new_tokens=1)
    assert len(seen) == len(sound) and sum(hidden.isnan().any() for each in seen for hidden in each.values())
    for before, beside in zip(sound, seen, strict=True):
        for slot in before:
            assert before.keys() == beside.keys() and (slot == 2 or torch.equal(before[slot], beside[slot]))
