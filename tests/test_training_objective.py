"""The objective: the reference numbers of its description, and equality with the decoder that it trains for."""

from __future__ import annotations

import math
import random
import types

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from tests.conftest import CHECKPOINTS, GOLDENS
from tests.test_training import checkpointing
from training import MTPCollator
from training.data import thousandths
from training.objective import IGNORED, Marks, Sample, blocks, places_of, sample_of, sees
from training.pack import Pack
from training.validation import MODES, validate
from upload_to_hub import assemble

MARKS = Marks((1, 2, 3), end=4, box_end=6, ref_end=8, null=11, mask=10, coord_start=100, coord_end=1100)
REFERENCE = [
    *(1, 20, 3, 40, 4, 3, 1, 2, 3),
    *(7, 21, 22, 23, 24, 25, 26, 27, 8),
    *(5, 105, 107, 109, 111, 6),
    *(7, 28, 8, 5, 9, 6, 4, 3),
]


def windows(sample: Sample) -> list[tuple]:
    """(anchor, inputs, first position, targets) of each window."""
    parts = [
        [each[place : place + 6] for place in range(sample.length, len(sample.ids), 6)]
        for each in (sample.ids, sample.positions, sample.targets)
    ]
    assert all(positions == list(range(positions[0], positions[0] + 6)) for positions in parts[1])
    return [(anchor, ids, at[0], told) for anchor, ids, at, told in zip(sample.anchors, *parts, strict=True)]


PICTURES = GOLDENS / "shapes" / "images"
DETECT = "Locate all the instances that matches the following description: {}."
ANSWERS = [
    "<ref>red circle</ref><box><100><200><300><400></box><box><500><500><700><750></box>",
    "<ref>a rather odd triangle</ref><box>none</box><ref>blue square</ref><box><0><0><250><250></box>",
]


def record(answer: str, picture: str = "002.png", query: str = "red circle") -> dict:
    turns = [{"from": "human", "value": DETECT.format(query)}, {"from": "gpt", "value": answer}]
    return {"name": "a record", "image": str(PICTURES / picture), "conversations": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return assemble(CHECKPOINTS["shapes"], tmp_path_factory.mktemp("training") / "drop-in")


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def collator(processor):
    return MTPCollator(processor, none="none")


def visible(samples: list[Sample]) -> torch.Tensor:
    places = places_of(samples)
    return sees(places[..., None], places[:, None])


def count_targets(sample: Sample) -> int:
    return sum(target != IGNORED for target in sample.targets)


def test_the_reference():
    sample = sample_of(REFERENCE, MARKS)
    mask = [10] * 5
    assert windows(sample) == [
        (8, [3, *mask], 8, [7, 21, 22, 23, 24, 25]),
        (14, [25, *mask], 14, [26, 27, 8, 11, 11, 11]),
        (17, [8, *mask], 17, [5, 105, 107, 109, 111, 6]),
        (23, [6, *mask], 23, [7, 28, 8, 11, 11, 11]),
        (26, [8, *mask], 26, [5, 9, 6, 11, 11, 11]),
        (29, [6, *mask], 29, [4, 11, 11, 11, 11, 11]),
    ]
    assert len(sample.ids) == 68 and sample.length == 32 and sample.positions[:32] == list(range(32))
    assert sample.targets[:32] == [IGNORED] * 8 + REFERENCE[9:31] + [IGNORED] * 2
    assert count_targets(sample) == 58
    seen = visible([sample])
    assert seen.sum(1).tolist() == [*range(1, 33), *(n for n in (14, 20, 23, 29, 32, 35) for _ in range(6))]
    assert seen.sum() == 1446


def test_a_point_sees_as_in_the_worked_example():
    sample = sample_of([1, 2, 3, 5, 105, 107, 6, 4, 3], MARKS)
    assert sample.targets == [
        *(IGNORED,) * 2,
        5,
        105,
        107,
        6,
        4,
        *(IGNORED,) * 2,
        5,
        105,
        107,
        6,
        11,
        11,
        4,
        *(11,) * 5,
    ]
    seen = visible([sample])
    assert count_targets(sample) == 17 and seen.sum() == 165
    assert all(row.nonzero().flatten().tolist() == [0, 1, *range(9, 15)] for row in seen[9:15])
    assert all(row.nonzero().flatten().tolist() == [*range(6), *range(15, 21)] for row in seen[15:])


@pytest.mark.parametrize(
    ("ids", "anchors", "targets", "count"),
    [
        ([1, 2, 3, 20, 21, 5, 105, 107, 6, 4, 3], [2, 8], [[20, 21, 5, 105, 107, 6], [4, *(11,) * 5]], 19),
        (
            [*(1, 2, 3, 5, 105, 6, 4, 3), *(1, 20, 3, 40, 4, 3, 1, 2, 3), *(5, 107, 109, 6, 4, 3)],
            [2, 5, 16, 20],
            [[5, 105, 6, 11, 11, 11], [4, *(11,) * 5], [5, 107, 109, 6, 11, 11], [4, *(11,) * 5]],
            33,
        ),
        ([1, 2, 3, 20, 21, 22, 4, 3], [], [], 4),  # chat too short for a window
        ([1, 2, 3, 5, 105, 6, 4, 3, 1, 2, 3, 5, 105], [2, 5], [[5, 105, 6, 11, 11, 11], [4, *(11,) * 5]], 16),
    ],
    ids=["words first", "two turns", "short chat", "a turn that was cut off"],
)
def test_blocks(ids, anchors, targets, count):
    sample = sample_of(ids, MARKS)
    assert sample.anchors == anchors and [told for *_, told in windows(sample)] == targets
    assert count_targets(sample) == count


def test_chat_has_whole_windows_at_a_random_offset():
    ids = [1, 2, 3, 20, 21, 22, 23, 24, 25, 26, 27, 4, 3]
    drawn = {anchor: block for seed in range(50) for anchor, block in blocks(ids, MARKS, random.Random(seed))}
    assert drawn == {anchor: ids[anchor + 1 : anchor + 7] for anchor in (2, 3, 4, 5)}
    assert sample_of(ids, MARKS) == sample_of(ids, MARKS)


def test_nothing_to_learn():
    assert sample_of([1, 2, 3, 20, 21], MARKS) is None
    assert sample_of([20, 21, 4], MARKS) is None


def test_coordinates_are_rounded_and_stay_inside():
    assert thousandths((-3, 0, 0.31, 0.5), (640, 1000)) == [0, 0, 0, 1]
    assert thousandths((320, 480), (640, 640)) == [500, 750] and thousandths((640, 700), (640, 640)) == [1000, 1000]


# ---- the pass


def embedded(model, batch) -> torch.Tensor:
    slots = batch["input_ids"] == model.image_token_index
    features = model.get_image_features(batch["pixel_values"], batch["image_grid_hws"])
    return model.embed_prompt(batch["input_ids"], features, slots).detach()


def test_uniform_logits_cost_the_vocabularys_logarithm():
    sample = sample_of(REFERENCE, MARKS)
    head = nn.Linear(8, 1200, bias=False)
    nn.init.zeros_(head.weight)
    decoder = lambda inputs_embeds, **told: types.SimpleNamespace(last_hidden_state=inputs_embeds)  # noqa: E731
    model = types.SimpleNamespace(model=decoder, get_output_embeddings=lambda: head)
    inputs = {"labels": torch.tensor([sample.targets]), "inputs_embeds": torch.randn(1, 68, 8)}
    told = Pack([sample], MARKS).run(model, **inputs)
    assert math.isclose(told.loss.item(), math.log(1200), rel_tol=1e-5)
    assert told.parts[:, 1].tolist() == [22, 36, 8, 14]
    halved = Pack([sample], MARKS).run(model, **inputs, num_items_in_batch=116)
    assert math.isclose(halved.loss.item(), math.log(1200) / 2, rel_tol=1e-5)


def test_windows_are_generates_steps_and_leave_the_causal_part_alone(shapes, collator):
    """Each window's logits are those that generate decides by with the same tokens committed."""
    batch = collator([record(ANSWERS[0]), record(ANSWERS[1], "065.png", "x")])
    with torch.no_grad():
        logits = shapes(**{**batch, "labels": None}).logits[0]
    start = 0
    for number, answer in enumerate(ANSWERS):
        alone = collator([record(answer, ("002.png", "065.png")[number], ("red circle", "x")[number])])
        pack, ids = alone["windows"], alone["input_ids"]
        length, width = pack.lengths
        pictures = {name: alone[name] for name in ("pixel_values", "image_grid_hws")}
        with torch.no_grad():
            plain = shapes(input_ids=ids[:, :length], **pictures).logits[0]
        torch.testing.assert_close(logits[start : start + length], plain, atol=1e-5, rtol=1e-4)
        for place in range(length, length + width, 6):
            anchor = int(alone["position_ids"][0, place])
            seen = []
            shapes.generate(
                ids[:, : anchor + 1],
                **pictures,
                generation_mode="fast",
                max_new_tokens=1,
                logits_processor=[lambda ids, scores, seen=seen: seen.append(scores.clone()) or scores],
            )
            torch.testing.assert_close(logits[start + place : start + place + 6], seen[0], atol=1e-5, rtol=1e-4)
        start += length + width
    assert start == len(logits)


def test_no_gradient_flows_from_a_window_to_what_it_must_not_see(shapes, collator):
    batch = collator([record(ANSWERS[0]), record(ANSWERS[1], "065.png", "x")])
    leaf = embedded(shapes, batch).requires_grad_()
    pack = batch["windows"]
    logits = pack.run(shapes.text_model, inputs_embeds=leaf, position_ids=batch["position_ids"]).logits[0]
    seen = sees(pack.places[..., None], pack.places[:, None])
    for row in range(3, len(logits), 7):  # places of all kinds
        (gradient,) = torch.autograd.grad(logits[row].sum(), leaf, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, seen[row]), row


def test_a_pack_is_its_samples(shapes, collator):
    records = [record(ANSWERS[0]), record(ANSWERS[1], "065.png", "x"), record("<ref>red circle</ref><box>none</box>")]
    told = [shapes(**collator([each]), num_items_in_batch=1) for each in records]
    together = shapes(**collator(records), num_items_in_batch=1)
    torch.testing.assert_close(together.loss, sum(each.loss for each in told))
    torch.testing.assert_close(together.parts, sum(each.parts for each in told))


def test_flex_attention_gives_the_same(shapes, collator, processor, monkeypatch):
    """Not compiled: there is no kernel of it for CPUs that takes such masks."""
    monkeypatch.setattr("training.pack.compile_friendly_flex_attention", uncompiled)
    records = [record(ANSWERS[0]), record(ANSWERS[1])]
    with torch.no_grad():
        expected = shapes(**collator(records)).loss
        told = shapes(**MTPCollator(processor, none="none", flex=True)(records)).loss
    torch.testing.assert_close(told, expected)


def uncompiled(query, key, value, training, **told):
    return flex_attention(query, key, value, **told)


# ---- transformers' Trainer


@pytest.mark.slow
def test_trainer_as_the_model_card_writes_it(folder, collator, tmp_path):
    """Also: rows without a picture, gradient checkpointing, evaluation; and the answer learnt is every mode's."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    checkpointing(model, use_reentrant=False)
    learnt = record(ANSWERS[1].replace("rather odd ", ""), "065.png", "x")
    chat = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there, you."}]}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=50,
        per_device_train_batch_size=2,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=[learnt, chat], eval_dataset=[learnt], data_collator=collator
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 < before
    told = validate(model, collator.processor, [learnt])
    assert {mode: (line["precision"], line["recall"]) for mode, line in told.items()} == dict.fromkeys(MODES, (1, 1))
    assert told["fast"]["forwards"] == 5 < told["slow"]["forwards"]


# ---- what is refused


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("<ref>red circle</ref><box>None</box>", "word for nothing found is 'none'"),
        ("<box>(100,200,400,500)</box>", "expected two or four of <0>"),
        ("<box><1><2><3></box>", "expected two or four"),
        ("<box><1><2><3><1001></box>", "expected two or four"),
        ("<box><9><2><3><4></box>", "top left corner first"),
        ("<box><1><5><3><4></box>", "top left corner first"),
        ("<ref>red circle<box><1><2><3><4></box>", "without its end"),
    ],
)
def test_answers_that_are_not_the_models_are_refused_by_name(collator, answer, message):
    with pytest.raises(ValueError, match=f"a record: .*{message}"):
        collator([record(answer)])


def test_records_that_cannot_be_learnt_are_refused_by_name(collator, processor):
    said = record(ANSWERS[0])
    with pytest.raises(ValueError, match="a record: turns are from"):
        collator([{**said, "conversations": said["conversations"][:1]}])
    with pytest.raises(ValueError, match=r"a record: .* max_length is 60"):
        MTPCollator(processor, none="none", max_length=60)([said])
