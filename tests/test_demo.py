"""What the demo's checkpoint is trained from and on (demo/train.py)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from demo import train
from demo.scenes import COLOURS, LABELS, SHAPES, scenes
from tests.conftest import tokenizer_of
from training.validation import found, matched
from upload_to_hub import assemble


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    train.begin(folder / "start")
    folder = assemble(folder / "start", folder / "drop-in")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def test_more_words_and_the_others_as_they_were(start):
    model, processor = start
    old, new = tokenizer_of("shapes"), processor.tokenizer
    for task in ("detect", "point", "single"):
        text = processor.build_question(task, "red circle") + "<ref>blue square</ref><box><0><17><1000><2></box>"
        assert new.tokenize(text) == old.tokenize(text)
    assert new.tokenize("<ref>red half circle</ref>")[1:-1] == ["red", "Ġhalf", "Ġcircle"]
    roles = model.config.token_roles
    names = {"box_start": "<box>", "ref_end": "</ref>", "none": "none", "null": "<null>", "mask": "<text_mask>"}
    assert {name: new.decode([getattr(roles, name)]) for name in names} == names
    assert len(new) <= model.get_input_embeddings().num_embeddings


def test_a_scene_is_the_same_each_time_and_its_truth_is_asked_for(start):
    model, processor = start
    questions = train.Questions(processor)
    first, later = questions[0], questions[1]
    assert questions[0]["conversations"] == first["conversations"] != later["conversations"]
    batch = train.Collator(processor, none=train.NONE)([first, later])
    tokens = [model.image_token_index == each for each in batch["input_ids"][0].tolist()]
    truth = batch.pop("truth")
    assert len(truth) == sum(tokens) and int(truth[:, 0].max()) > 0
    (rows, columns), drawn = (batch["image_grid_hws"][0] // 2).tolist(), first["scene"]
    assert rows != columns
    shown = truth[: rows * columns].view(rows, columns, 6)
    for label, (left, top, right, bottom) in drawn.boxes:
        told = shown[int((top + bottom) / 2000 * rows), int((left + right) / 2000 * columns)]
        assert f"{[*COLOURS][told[0] - 1]} {[*SHAPES][told[1] - 1]}" == label
    assert torch.isfinite(model(**batch).loss)
    for drawn in scenes(20):
        assert {label for label, _ in drawn.boxes} <= {*LABELS}
        answer = train.turns(drawn, "detect", drawn.queries, processor)[1]["value"]
        (said,) = found(processor, [answer])
        true = [(label, [side / 1000 for side in box]) for label in drawn.queries for box in drawn.boxes_of(label)]
        assert len(said) == matched(said, true) == len(true)
