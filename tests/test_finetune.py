"""finetune.py and what it reads: records of every kind, bad ones, a run from data to a folder that loads, adapters."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

import finetune
from scan.records import KIND, MANIFEST, RESULTS, Detection, Record
from tests.conftest import CHECKPOINTS, GOLDENS, model_of
from training.data import answer_of, messages_of, read
from training.validation import matched
from upload_to_hub import assemble

BASE = CHECKPOINTS["shapes"]
PICTURES = GOLDENS / "shapes" / "images"
DETECT = "Locate all the instances that matches the following description: {}."


def question(task: str, labels: list[str]) -> str:
    return f"{task}: {'</c>'.join(labels)}"


def turns(asked: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def pictures(tmp_path):
    """Two of 200 × 100 pixels."""
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (200, 100)).save(folder / name)
    return folder


# ---- reading


def test_json_lines_and_a_recipe(tmp_path):
    line = {"image": "a.png", "conversations": turns("Where?", "<box><1><2><3><4></box>")}
    path = write_lines(tmp_path / "boxes.jsonl", [line, "not json\n", {**line, "image_list": ["a.png", "b.png"]}])
    first, second, third = read(path, question, "None")
    assert first == {**line, "image": [str(tmp_path / "a.png")], "name": "boxes.jsonl:1"}
    assert second["name"] == "boxes.jsonl:2" and "Expecting value" in second["error"]
    assert third["image"] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"mine": {"annotation": ["boxes.jsonl"], "root": "there", "repeat_time": 2}}))
    records = list(read(recipe, question, "None"))
    assert len(records) == 6 and records[0]["image"] == [str(tmp_path / "there" / "a.png")]


def test_coco(tmp_path, pictures):
    images = [{"id": i, "file_name": f"{name}.png", "width": 200, "height": 100} for i, name in enumerate("ab")]
    boxes = [(0, 7, [100, 50, 20, 30]), (0, 7, [10, 0, 20, 10]), (1, 9, [0, 0, 200, 100])]
    told = {
        "images": images,
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [{"image_id": i, "category_id": c, "bbox": b} for i, c, b in boxes]
        + [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1}],
    }
    path = pictures / "coco.json"
    path.write_text(json.dumps(told))
    first, second = read(path, question, "None", negatives=0)
    assert first["size"] == (200, 100) and first["image"] == str(pictures / "a.png")
    said = "<ref>cat</ref><box><50><0><150><100></box><box><500><500><600><800></box>"
    assert first["conversations"] == turns("detect: cat", said)
    assert second["conversations"] == turns("detect: dog", "<ref>dog</ref><box><0><0><1000><1000></box>")
    asked = next(iter(read(path, question, "none", negatives=5)))["conversations"]
    assert {asked[0]["value"], asked[1]["value"]} <= {
        *("detect: cat</c>dog", f"{said}<ref>dog</ref><box>none</box>"),
        *("detect: dog</c>cat", f"<ref>dog</ref><box>none</box>{said}"),
    }
    assert asked == next(iter(read(path, question, "none", negatives=5)))["conversations"]


def test_yolo(tmp_path, pictures):
    labels = tmp_path / "labels" / "train"
    labels.mkdir(parents=True)
    write_lines(labels / "a.txt", ["1 0.5 0.5 0.2 0.4\n"])
    write_lines(labels / "b.txt", ["1 0.5 oops\n"])
    path = tmp_path / "data.yaml"
    path.write_text("train: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n")
    first, second = read(path, question, "None", negatives=0)
    assert first["conversations"] == turns("detect: dog", "<ref>dog</ref><box><400><300><600><700></box>")
    assert second["name"] == "b.png" and "oops" in second["error"]
    (tmp_path / "images" / "val").mkdir()
    shutil.copy(pictures / "a.png", tmp_path / "images" / "val" / "c.png")
    (only,) = read(f"{path}:val", question, "None", negatives=1)  # without a file of labels: nothing is there
    assert only["conversations"][1]["value"] in ("<ref>cat</ref><box>None</box>", "<ref>dog</ref><box>None</box>")


def test_a_scan(tmp_path, pictures):
    told = {"source": str(pictures / "a.png"), "frame": None, "time": None, "task": "detect", "status": "ok"}
    told |= {"width": 200, "height": 100}
    found = (Detection("cat", 0, box=(100, 50, 120, 80)), Detection("cat", 0, box=(10, 0, 30, 10)))
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / MANIFEST).write_text(json.dumps({"kind": KIND}))
    answers = [
        Record(**told, query="cat", detections=found),
        Record(**{**told, "task": "point"}, query="dog", detections=(Detection("", 0, point=(20, 10)),)),
        Record(**told, query="bird"),
        Record(**{**told, "status": "error", "error": "no picture"}, query="cow"),
    ]
    write_lines(tmp_path / "scan" / RESULTS, [record.to_json() for record in answers])
    boxes, points, none, failed = read(tmp_path / "scan", question, "None")
    said = "<ref>cat</ref><box><50><0><150><100></box><box><500><500><600><800></box>"
    assert boxes["conversations"] == turns("detect: cat", said) and boxes["size"] == (200, 100)
    assert points["conversations"] == turns("point: dog", "<box><100><100></box>")
    assert none["conversations"][1]["value"] == "<ref>bird</ref><box>None</box>"
    assert failed["error"] == "no picture" and "'cow'" in failed["name"]


def test_an_answers_order():
    assert answer_of([("b", [[5, 1, 6, 2], [1, 9, 3, 9]]), ("a", [])], "none") == (
        "<ref>b</ref><box><1><9><3><9></box><box><5><1><6><2></box><ref>a</ref><box>none</box>"
    )


def test_pictures_stand_where_the_questions_say():
    told = [*turns("Which of <image> and <image>?", "That."), *turns("And <image>?", "Too.")]
    texts = [
        "".join(part.get("text", "*") for part in message["content"])
        for message in messages_of({"image": ["a", "b", "c"], "conversations": told})
    ]
    assert texts == ["***Which of <image-1> and <image-2>?", "That.", "And <image-3>?", "Too."]


def test_matching_counts_each_thing_once_with_its_label():
    true = [("cat", [0, 0, 0.5, 0.5]), ("cat", [0.5, 0.5, 1, 1]), ("", [0.5, 0.5])]
    assert matched([("cat", [0, 0, 0.5, 0.5])] * 2, true) == 1
    assert matched([("dog", [0, 0, 0.5, 0.5]), ("cat", [0.5, 0.5, 0.9, 0.7])], true) == 0
    assert matched([("", [0.52, 0.46]), ("cat", [0.45, 0.5, 1, 1])], true) == 2


# ---- a run


def data(folder: Path, answers: list[str]) -> Path:
    lines = [{"image": str(PICTURES / "065.png"), "conversations": turns(DETECT.format("x"), a)} for a in answers]
    return write_lines(folder / "data.jsonl", lines)


def run(*arguments: object) -> None:
    fixed = "--batch 2 --accumulate 1 --warmup 0 --workers 0 --log-every 1 --every 2 --modes hybrid slow"
    finetune.main(["--method", "full", *map(str, arguments), *fixed.split()])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_bad_records_are_named_and_bounded(tmp_path, capsys):
    good = "<ref>blue square</ref><box><0><0><250><250></box>"
    path = data(tmp_path, [good, "<box>None</box>", "<box><9><9><1><1></box>", good])
    missing = {"image": "no.png", "conversations": turns("Where?", good)}
    with path.open("a") as file:
        file.write(json.dumps(missing) + "\n" + json.dumps({**missing, "image": []}) + "\n")
    with pytest.raises(SystemExit, match="--skip 2: leave out so many with --skip 3, or mend them"):
        run("--model", BASE, "--train", path, "--out", tmp_path / "out", "--skip", 2)
    told = capsys.readouterr().err
    assert "data.jsonl:2: <box>None</box>; this model's word for nothing found is 'none'" in told
    assert "data.jsonl:3: " in told and "data.jsonl:5: " in told and "3 of 6 records are bad" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", PICTURES, "--train", "x.jsonl"], "base: .*images lacks config.json"),
        (["--model", BASE, "--train", "missing.jsonl"], "missing.jsonl: .*No such file"),
        (["--model", BASE, "--train", PICTURES], "manifest.json"),
    ],
)
def test_what_cannot_begin_says_so(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(*arguments, "--out", tmp_path / "out")


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_what_is_frozen_does_not_learn(part):
    args = finetune.parser().parse_args(["--model", "m", "--train", "t", "--out", "o", "--freeze", part])
    args.lora, model = False, copy.deepcopy(model_of("shapes"))
    prefix = {"vision": "vision_model.", "projector": "mlp1.", "language": "language_model."}[part]
    for name, weight in finetune.prepared(model, args).named_parameters():
        assert weight.requires_grad != name.startswith(prefix)


def test_adapters_need_peft_and_say_so_first(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="--method lora"):
        run("--model", "nowhere", "--train", "missing.jsonl", "--out", tmp_path, "--method", "lora")


def test_a_run_from_data_to_a_folder_that_loads(tmp_path, capsys):
    """All weights; stopped after two steps, it goes on, and the best of what was looked at is what lies there."""
    path = data(tmp_path, ["<ref>blue square</ref><box><0><0><250><250></box>", "Hello there."])
    common = ["--model", BASE, "--train", path, "--validate", path, "--out", tmp_path / "out"]
    run(*common, "--steps", 2, "--lr", 1e-3)
    first = tensors(tmp_path / "out" / "model")
    told = capsys.readouterr().out
    assert "loss_causal" in told and "loss_null" in told and "eval_hybrid_f1" in told
    run(*common, "--steps", 4, "--lr", 1e-3, "--no-first-look")
    again = capsys.readouterr().out
    assert again.count("'loss_window'") == 2, "two of the four steps were left"
    result, base = tensors(tmp_path / "out" / "model"), tensors(BASE)
    assert {name: (t.shape, t.dtype) for name, t in result.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    assert not torch.equal(first["mlp1.1.weight"], base["mlp1.1.weight"])
    state = json.loads((tmp_path / "out" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-2", "or this tells nothing"
    assert torch.equal(first["mlp1.1.weight"], result["mlp1.1.weight"])
    beside = {each.name for each in BASE.iterdir()} - {"model.safetensors"}
    assert all((tmp_path / "out" / "model" / name).read_bytes() == (BASE / name).read_bytes() for name in beside)
    assert loads(tmp_path / "out" / "model", tmp_path / "drop-in")["mlp1.1.weight"].equal(result["mlp1.1.weight"])


def loads(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    model = AutoModel.from_pretrained(assemble(folder, target), trust_remote_code=True)
    return model.state_dict()


@pytest.mark.slow
def test_adapters_are_trained_and_merged(tmp_path, capsys):
    path = data(tmp_path, ["<ref>blue square</ref><box><0><0><250><250></box>"])
    common = ["--model", BASE, "--train", path, "--method", "lora", "--rank", 8, "--lr", 1e-2]
    run(*common, "--out", tmp_path / "out", "--steps", 60)
    assert "trainable params" in capsys.readouterr().out
    result, base = tensors(tmp_path / "out" / "model"), tensors(BASE)
    changed = {name for name in base if not torch.equal(result[name], base[name])}
    assert result.keys() == base.keys() and changed == {
        name for name in base if name.startswith("mlp1") or (name.endswith("_proj.weight"))
    }
    model = AutoModel.from_pretrained(assemble(tmp_path / "out" / "model", tmp_path / "d"), trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "d", trust_remote_code=True)
    talk = [{"role": "user", "content": [{"type": "image", "image": str(PICTURES / "065.png")}, DETECT.format("x")]}]
    inputs = processor.apply_chat_template([talk], add_generation_prompt=True, tokenize=True, return_dict=True)
    said = {mode: model.generate(**inputs, generation_mode=mode) for mode in ("fast", "hybrid", "slow", "verified")}
    texts = {mode: processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :])[0] for mode, ids in said.items()}
    assert texts == dict.fromkeys(said, "<ref>blue square</ref><box><0><0><250><250></box><|im_end|>")
