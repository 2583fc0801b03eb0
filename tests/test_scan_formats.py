"""What a scan found, in other tools' formats: by the layout that is documented, and by the tools that read it."""

import csv
import dataclasses
import json
import re
import weakref
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml
from PIL import Image

from scan.formats import FORMATS, export
from scan.records import KIND, Detection, Record

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "results.schema.json").read_text(encoding="utf-8"))
QUERIES = ["кот", 'a "red"\ncar\x01', "no such"]
BOX = Detection("кот", 0, (10.0, 20.0, 30.5, 60.25), None, 0.9, 0.75)
OTHER = Detection('a "red" car.', 1, (0.0, 0.0, 100.0, 80.0), None, 0.5, 1.0)
POINT = Detection("кот", 0, None, (99.9, 79.9), 0.25, None)
SIZE = {"width": 100, "height": 80}


def record(source: str, query: str = QUERIES[0], *found: Detection, **more) -> Record:
    told = {"frame": None, "time": None, "task": "detect", "status": "ok", **SIZE, **more}
    told |= {"text": "…", "finish_reason": "end", "tokens": 3, "mode": "hybrid", "seconds": 0.5}
    return Record(source=source, query=query, detections=found, **told)


def failed(source: str, query: str = QUERIES[0], **more) -> Record:
    told = {"frame": None, "time": None, "task": "detect", "error": "broken", **more}
    return Record(source=source, query=query, status="error", **told)


def scanned(folder: Path, records, queries=QUERIES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"kind": KIND, "model": "me/model", "sources": [], "settings": {"queries": queries}, "versions": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with open(folder / "results.jsonl", "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(each.to_json(), ensure_ascii=False) + "\n" for each in records)
    return folder


ROOT = "/data/pictures"
RECORDS = [
    record(f"{ROOT}/b/é 1.jpg", QUERIES[0], BOX),
    record(f"{ROOT}/a/1.png", QUERIES[0]),
    record(f"{ROOT}/b/é 1.jpg", QUERIES[1], OTHER, BOX),
    failed(f"{ROOT}/a/1.png", QUERIES[1]),
    record(f"{ROOT}/a/1.jpg", QUERIES[0]),
    record(f"{ROOT}/A/1.jpg", QUERIES[0], OTHER),
    record(f"{ROOT}/clip.mp4", QUERIES[0], BOX, frame=12, time=0.5),
    record(f"{ROOT}/clip.mp4", QUERIES[0], frame=3, time=0.125),
    record("https://example.org/x/y%20z.jpg", QUERIES[0], BOX),
    record("data:image/png,0123456789abcdef", QUERIES[0], BOX),
    failed(f"{ROOT}/broken.jpg"),
    record(f"{ROOT}/\udcff:?.jpg", QUERIES[0], BOX),
    record(f"{ROOT}/list.parquet:7", QUERIES[0]),
]
NAMES = ["A/1", "a/1-2", "a/1-3", "b/é 1", "clip-000003", "clip-000012", "list.parquet_7", "png,0123456789abcdef"]
NAMES += ["y z", "�__"]


@pytest.fixture
def folder(tmp_path):
    return scanned(tmp_path / "found", RECORDS)


@pytest.fixture
def pointed(tmp_path):
    return scanned(tmp_path / "points", [record("a.jpg", QUERIES[0], POINT, BOX), record("b.jpg", QUERIES[0], BOX)])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def coco(folder: Path):
    return json.loads((folder / "coco" / "annotations.json").read_text(encoding="utf-8"))


def test_coco(folder):
    export(folder, ["coco"])
    told = coco(folder)
    assert sorted(re.sub(r"\.(jpg|png)$", "", image["file_name"]) for image in told["images"]) == NAMES
    assert [category["id"] for category in told["categories"]] == [1, 2, 3]
    assert [category["name"] for category in told["categories"]] == QUERIES
    by_source = {(image["source"], image["frame"]): image for image in told["images"]}
    assert (f"{ROOT}/broken.jpg", None) not in by_source, "it was not looked at: that is not finding nothing"
    assert by_source[f"{ROOT}/clip.mp4", 12]["file_name"] == "clip-000012.jpg"
    image = by_source[f"{ROOT}/b/é 1.jpg", None]
    assert (image["width"], image["height"], image["file_name"]) == (100, 80, "b/é 1.jpg")
    mine = [one for one in told["annotations"] if one["image_id"] == image["id"]]
    assert [one["category_id"] for one in mine] == [1, 2, 1], "a box is of the query that it answers, however called"
    assert mine[0]["bbox"] == [10.0, 20.0, 20.5, 40.25] and mine[0]["area"] == 825.12
    assert (mine[1]["label"], mine[1]["score"], mine[1]["label_score"]) == ('a "red" car.', 0.5, 1.0)
    assert len({one["id"] for one in told["annotations"]}) == len(told["annotations"]) == 8


def test_yolo(folder, pointed):
    export(folder, ["yolo"])
    labels = {str(path.relative_to(folder / "yolo/labels")) for path in (folder / "yolo/labels").rglob("*.txt")}
    assert labels == {f"{name}.txt" for name in NAMES}
    told = yaml.safe_load((folder / "yolo/data.yaml").read_text(encoding="utf-8"))
    assert told["names"] == ["кот", 'a "red"\ncar�', "no such"] and "kpt_shape" not in told
    lines = (folder / "yolo/labels/b/é 1.txt").read_text().splitlines()
    assert lines == ["0 0.2025 0.501563 0.205 0.503125", "1 0.5 0.5 1 1", "0 0.2025 0.501563 0.205 0.503125"]
    assert (folder / "yolo/labels/a/1-2.txt").read_bytes() == b""
    with open(folder / "yolo/pictures.csv", encoding="utf-8", newline="") as file:
        rows = {row["file_name"]: row for row in csv.DictReader(file)}
    assert rows["clip-000012.jpg"] == {
        "file_name": "clip-000012.jpg", "source": f"{ROOT}/clip.mp4", "frame": "12", "time": "0.5",
    }  # fmt: skip
    export(pointed, ["yolo"])
    assert yaml.safe_load((pointed / "yolo/data.yaml").read_text(encoding="utf-8"))["kpt_shape"] == [1, 3]
    first, second = (pointed / "yolo/labels/a.txt").read_text().splitlines()
    assert first == "0 0.999 0.99875 0 0 0.999 0.99875 2" and second.endswith(" 0 0 0")


def test_voc(folder, pointed):
    export(folder, ["voc"])
    root = ElementTree.parse(folder / "voc/Annotations/b/é 1.xml").getroot()
    assert [root.findtext(name) for name in ("folder", "filename", "segmented")] == ["b", "é 1.jpg", "0"]
    assert [root.findtext(f"size/{name}") for name in ("width", "height", "depth")] == ["100", "80", "3"]
    boxes = [[int(value.text) for value in box] for box in root.iter("bndbox")]
    assert boxes[:2] == [[11, 21, 30, 60], [1, 1, 100, 80]], "from 1, with the last pixel"
    assert [one.findtext("name") for one in root.iter("object")] == ["кот", 'a "red"\ncar�', "кот"]
    assert ElementTree.parse(folder / "voc/Annotations/clip-000012.xml").findtext("source/frame") == "12"
    assert ElementTree.parse(folder / "voc/Annotations/�__.xml").findtext("source/source") == f"{ROOT}/�:?.jpg"
    export(pointed, ["voc"])
    point, _ = ElementTree.parse(pointed / "voc/Annotations/a.xml").getroot().iter("object")
    assert [each.text for each in point.find("bndbox")] == ["100", "80"] * 2
    assert [each.text for each in point.find("point")] == ["100", "80"]


def test_labelstudio(folder, pointed):
    export(folder, ["labelstudio"])
    config = ElementTree.parse(folder / "labelstudio/config.xml").getroot()
    assert [label.get("value") for label in config.find("RectangleLabels")] == ["кот", 'a "red"\ncar�', "no such"]
    tasks = {
        (task["data"]["source"], task["data"]["frame"]): task
        for task in json.loads((folder / "labelstudio/tasks.json").read_text(encoding="utf-8"))
    }
    assert tasks["https://example.org/x/y%20z.jpg", None]["data"]["image"] == "https://example.org/x/y%20z.jpg"
    task = tasks[f"{ROOT}/b/é 1.jpg", None]
    assert task["data"]["image"] == "/data/local-files/?d=pictures/b/%C3%A9%201.jpg"
    (found,) = task["predictions"]
    assert found["model_version"] == "me/model" and len(found["result"]) == 3
    first = found["result"][0]
    assert first["value"] == {
        "x": 10.0, "y": 25.0, "width": 20.5, "height": 50.3125, "rotation": 0, "rectanglelabels": ["кот"],
    }  # fmt: skip
    assert first["score"] == 0.9 and first["original_width"] == 100
    export(pointed, ["labelstudio"])
    result = json.loads((pointed / "labelstudio/tasks.json").read_text())[0]["predictions"][0]["result"][0]
    assert result["type"] == "keypointlabels" and result["value"]["keypointlabels"] == ["кот"]


def test_csv(folder):
    export(folder, ["csv"])
    with open(folder / "csv/detections.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 + 6, "a line for each detection, and one where there is none"
    assert [row["x_max"] for row in rows[:2]] == ["30.5", ""]
    assert {(row["source"], row["status"], row["error"]) for row in rows if row["status"] == "error"} == {
        (f"{ROOT}/a/1.png", "error", "broken"), (f"{ROOT}/broken.jpg", "error", "broken"),
    }  # fmt: skip
    assert rows[2]["label"] == 'a "red" car.' and rows[2]["query"] == 'a "red"\ncar�' and rows[2]["class_id"] == "1"


def test_categories_of_what_was_not_asked_by_the_scan(tmp_path):
    """Lists bring questions of their own, points need not be called anything, and any text may be found."""
    text = Detection("EXIT", -1, (1.0, 2.0, 3.0, 4.0))
    records = [
        record("a.jpg", "dog", dataclasses.replace(BOX, label="Dog", class_id=0)),
        record("b.jpg", "save button", dataclasses.replace(POINT, label=""), task="point"),
        record("c.jpg", "", text, task="text"),
        record("d.jpg", "EXIT", dataclasses.replace(text, class_id=0), task="text"),
    ]
    folder = scanned(tmp_path / "found", records, ["cat"])
    export(folder, ["coco"])
    told = coco(folder)
    names = {category["id"]: category["name"] for category in told["categories"]}
    assert list(names.values()) == ["cat", "Dog", "EXIT", "save button", "text"]
    assert [names[one["category_id"]] for one in told["annotations"]] == ["Dog", "save button", "text", "EXIT"]
    assert told["annotations"][2]["label"] == "EXIT"


def test_an_empty_scan(tmp_path):
    folder = scanned(tmp_path / "found", [failed("a.jpg")])
    export(folder, FORMATS)
    assert coco(folder)["images"] == [] and json.loads((folder / "labelstudio/tasks.json").read_text()) == []


# ---- files


def test_an_export_is_made_again_until_somebody_changes_it(folder):
    export(folder, FORMATS)
    first = files(folder)
    assert {path.split("/")[0] for path in first} == {*FORMATS, "manifest.json", "results.jsonl"}
    export(folder, FORMATS)
    assert files(folder).keys() == first.keys()
    for change in (
        lambda at: (at / "pictures.csv").write_text("mine"),
        lambda at: (at / "mine.txt").write_text("mine"),
        lambda at: (at / "labels" / "A" / "1.txt").unlink(),
        lambda at: (at / "labels" / "mine").mkdir() or (at / "labels" / "mine" / "a.txt").touch(),
    ):
        export(folder, ["yolo"])
        change(folder / "yolo")
        before = files(folder)
        with pytest.raises(ValueError, match=r"yolo: was .*changed"):
            export(folder, ["coco", "yolo"])
        assert files(folder) == before, "nothing else was begun"
        (folder / "yolo").rename(folder / f"moved-{len(list(folder.iterdir()))}")


def test_pictures_beside_an_export_stay(folder):
    """Training tools look for yolo/images beside yolo/labels."""
    export(folder, ["yolo"])
    images = folder / "yolo" / "images"
    images.symlink_to(Path("..", "..", "pictures"))
    export(folder, ["yolo"])
    assert images.readlink() == Path("..", "..", "pictures")
    images.unlink()
    images.mkdir()
    (images / "a.jpg").write_text("mine")
    export(folder, ["yolo"])
    assert (images / "a.jpg").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder", "empty"])
def test_what_was_not_exported_is_not_replaced(folder, kind):
    if kind == "file":
        (folder / "coco").write_text("mine")
    else:
        (folder / "coco").mkdir()
    if kind == "folder":
        (folder / "coco" / "mine.json").write_text("{}")
    before = files(folder)
    with pytest.raises(ValueError, match=r"coco: was not exported"):
        export(folder, ["coco"])
    assert files(folder) == before


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_that_fails_leaves_what_was_there(folder, name, monkeypatch):
    export(folder, [name])
    before = files(folder)
    written = FORMATS[name]

    def full(scratch, data):
        written(scratch, data)
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, name, full)
    with pytest.raises(OSError, match="No space"):
        export(folder, [name])
    assert files(folder) == before and not list(folder.glob(".*"))


def test_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="formats: got 'cocoa'"):
        export(folder, ["csv", "cocoa"])
    assert not (folder / "csv").exists()
    with pytest.raises(FileNotFoundError):
        export(tmp_path / "nowhere", ["csv"])


def test_a_scan_that_still_runs(folder, monkeypatch):
    """What is answered while it is exported is left for the next time, and breaks nothing."""
    from scan import formats

    passes = []

    def read(folder):
        passes.append(None)
        later = [record("later.jpg", QUERIES[0], BOX), record(f"{ROOT}/a/1.jpg", QUERIES[1], BOX)]
        return iter(RECORDS[:5] if len(passes) == 1 else [*RECORDS, *later])

    monkeypatch.setattr(formats, "read_records", read)
    for name in FORMATS:
        passes.clear()
        export(folder, [name])
    assert len(coco(folder)["images"]) == 3 and len(coco(folder)["annotations"]) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_records_are_not_kept(folder, name, monkeypatch):
    """However many there are, those of a few pictures are in memory at once."""
    from scan import formats

    living: weakref.WeakSet[Record] = weakref.WeakSet()
    most = []

    def read(folder):
        for number in range(400):
            for query in QUERIES[:2]:
                living.add(one := record(f"{number // 2 * 2 + (query == QUERIES[1])}.jpg", query, BOX, frame=number))
                most.append(len(living))
                yield one

    monkeypatch.setattr(formats, "read_records", read)
    export(folder, [name])
    assert max(most) < 10 and len(most) >= 800


# ---- the tools that read them


@pytest.fixture
def whole(tmp_path):
    """A scan of pictures that are there, under names that a file can have."""
    root = tmp_path / "pictures"
    root.mkdir()
    records = []
    for number, name in enumerate(("é.png", "b.png", "c.png")):
        Image.new("RGB", (100, 80), "white").save(root / name)
        records.append(record(str(root / name), QUERIES[0], *[BOX] * number))
        records.append(record(str(root / name), QUERIES[1], OTHER))
    return scanned(tmp_path / "found", records), root


@pytest.mark.slow
def test_pycocotools(whole):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    folder, _ = whole
    export(folder, ["coco"])
    truth = COCO(str(folder / "coco" / "annotations.json"))
    assert len(truth.getImgIds()) == 3 and len(truth.getAnnIds(catIds=[1])) == 3
    evaluation = COCOeval(truth, truth.loadRes(truth.loadAnns(truth.getAnnIds())), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco", "yolo", "voc"])
def test_supervision(whole, name):
    from supervision import DetectionDataset

    folder, root = whole
    export(folder, [name])
    if name == "coco":
        found = DetectionDataset.from_coco(str(root), str(folder / "coco/annotations.json"))
    elif name == "yolo":
        found = DetectionDataset.from_yolo(str(root), str(folder / "yolo/labels"), str(folder / "yolo/data.yaml"))
    else:
        found = DetectionDataset.from_pascal_voc(str(root), str(folder / "voc/Annotations"))
    boxes = {Path(path).name: found.annotations[path] for path in found.annotations}
    assert {name: len(each) for name, each in boxes.items()} == {"é.png": 1, "b.png": 2, "c.png": 3}
    names = [found.classes[i] for i in boxes["c.png"].class_id]
    assert sorted(names) == sorted(["кот", "кот", 'a "red"\ncar�' if name != "coco" else QUERIES[1]])
    cats = boxes["c.png"].xyxy[[name == "кот" for name in names]]
    assert cats.ravel().tolist() == pytest.approx([*BOX.box] * 2, abs=1.5 if name == "voc" else 0.01)


@pytest.mark.slow
def test_supervision_reads_points(pointed):
    from supervision import DetectionDataset

    root = pointed.parent / "pictures"
    root.mkdir()
    for name in "ab":
        Image.new("RGB", (100, 80)).save(root / f"{name}.jpg")
    export(pointed, ["coco", "yolo", "voc"])
    for found in (
        DetectionDataset.from_coco(str(root), str(pointed / "coco/annotations.json")),
        DetectionDataset.from_yolo(str(root), str(pointed / "yolo/labels"), str(pointed / "yolo/data.yaml")),
        DetectionDataset.from_pascal_voc(str(root), str(pointed / "voc/Annotations")),
    ):
        assert sorted(len(each) for each in found.annotations.values()) == [1, 2]


@pytest.mark.slow
def test_label_studio(folder, pointed):
    from label_studio_sdk.label_interface import LabelInterface

    for each in (folder, pointed):
        export(each, ["labelstudio"])
        interface = LabelInterface((each / "labelstudio/config.xml").read_text(encoding="utf-8"))
        interface.validate()
        for task in json.loads((each / "labelstudio/tasks.json").read_text(encoding="utf-8")):
            assert interface.validate_task({"data": task["data"]})
            for prediction in task["predictions"]:
                assert not interface.validate_prediction(prediction, return_errors=True)


# ---- results.jsonl


def test_records_are_what_the_schema_says(pointed):
    check = jsonschema.Draft202012Validator(SCHEMA)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    plain = lambda record: json.loads(json.dumps(record.to_json()))  # noqa: E731
    for each in [*RECORDS, record("a", QUERIES[0], POINT, BOX), failed("b", **SIZE), failed("c", id="7")]:
        check.validate(plain(each))
    assert {*SCHEMA["properties"]} == {each.name for each in dataclasses.fields(Record)}
    assert {*SCHEMA["$defs"]["detection"]["properties"]} == {each.name for each in dataclasses.fields(Detection)}
    good = plain(RECORDS[0])
    for name, value in {
        "status": "fine", "finish_reason": "because", "width": 0, "source": None, "tokens": -1, "frame": 1.5,
        "detections": [{**good["detections"][0], "point": [1, 2]}], "error": "told of a good one", "seconds": "1",
    }.items():  # fmt: skip
        assert not check.is_valid({**good, name: value}), name
    assert not check.is_valid({**plain(failed("a")), "error": None})
    assert not check.is_valid({name: value for name, value in good.items() if name != "source"})
