"""What the demo's checkpoint is trained from and on (demo/train.py)."""

from __future__ import annotations

from itertools import count

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
    torch.manual_seed(0)
    return train.fresh(folder), AutoProcessor.from_pretrained(folder, trust_remote_code=True)


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
    drawn_data = train.Drawn(processor)
    first, later = drawn_data[0, True], drawn_data[1, True]
    assert drawn_data[0, True]["conversations"] == first["conversations"] != later["conversations"]
    batch = train.Collator(processor, none=train.NONE)([first, later])
    tokens = [model.image_token_index == each for each in batch["input_ids"][0].tolist()]
    truth = batch["truth"]
    assert len(truth) == sum(tokens) and int(truth[:, 0].max()) > 0
    (rows, columns), drawn = (batch["image_grid_hws"][0] // 2).tolist(), first["scene"]
    assert rows != columns
    shown = truth[: rows * columns].view(rows, columns, 6)
    for label, (left, top, right, bottom) in drawn.boxes:
        told = shown[int((top + bottom) / 2000 * rows), int((left + right) / 2000 * columns)]
        assert f"{[*COLOURS][told[0] - 1]} {[*SHAPES][told[1] - 1]}" == label
    asking, image, mine, shows = train.targets_of(batch, truth, model)
    said = [
        told.count("</box>") for told in (turn["value"] for each in (first, later) for turn in each["conversations"])
    ]
    assert len(image) == len(truth) and 0 < len(asking) <= 2 * sum(said)  # as next tokens, and in windows
    assert (shows <= mine).all()
    for place, tokens in zip(asking, shows, strict=True):
        box = batch["labels"][0, place : place + 4] - model.config.coord_start_token_id
        assert (truth[tokens][:, 2:] == box).all() and tokens.any()
    for drawn in scenes(20):
        assert {label for label, _ in drawn.boxes} <= {*LABELS}
        answer = train.turns(drawn, "detect", drawn.queries, processor)[1]["value"]
        (said,) = found(processor, [answer])
        true = [(label, [side / 1000 for side in box]) for label in drawn.queries for box in drawn.boxes_of(label)]
        assert len(said) == matched(said, true) == len(true)


def test_the_tower_learns_alone_then_the_whole_and_the_command_goes_on(start, tmp_path, monkeypatch):
    better = count(1)
    monkeypatch.setattr(train, "validate", lambda *_, **__: {"hybrid": {"f1": next(better)}})
    monkeypatch.setattr(train, "LOOKED_AT", 2)
    monkeypatch.setattr(train, "ANSWERED", 2)

    def run(folder: str, answering: str) -> dict:
        parts = ["--looking", "1", "--answering", answering, "--every", "1"]
        monkeypatch.setattr("sys.argv", ["train.py", "--out", str(tmp_path / folder), *parts])
        train.main()
        return torch.load(tmp_path / folder / "state.pt")

    model, _ = start
    before = {name: each.clone() for name, each in model.state_dict().items()}
    alone = run("a", "0")["model"]
    moved = {name for name, each in alone.items() if not torch.equal(each, before[name])}
    assert "mlp1.1.weight" in moved and not any("language_model.model.layers" in name for name in moved)
    assert run("a", "2")["step"] == 3
    on, once = run("a", "2"), run("b", "2")
    assert all(torch.equal(each, once["model"][name]) for name, each in on["model"].items())
    best = AutoModel.from_pretrained(assemble(tmp_path / "b" / "best", tmp_path / "best"), trust_remote_code=True)
    assert len((tmp_path / "b" / "looks.jsonl").read_text().splitlines()) == 2
    assert all(torch.equal(each, once["model"][name]) for name, each in best.state_dict().items())
