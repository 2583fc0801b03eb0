"""locate.py: the demo checkpoint through the command line, and the parts that need no model."""

import base64
import json
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest
import torch
from PIL import Image

import hub.loading
import locate
from locate import Detection, Locator, draw, main, table

PROJECT = Path(__file__).resolve().parent.parent
GOLDENS = PROJECT / "tests" / "goldens" / "shapes"
PICTURES = GOLDENS / "images"
# (picture, task, query): what the stock model answered, found in cases.jsonl by the question
TRIANGLES = ("044.png", "Locate all the instances that matches the following description: yellow triangle.")
SQUARES = ("030.png", "Locate all the instances that matches the following description: orange square.")
POINT = ("012.png", "Point to: red circle.")


def stock_answer(file, question):
    """What the stock's greedy hybrid run said, and the places in it as fractions of the picture."""
    with open(GOLDENS / "cases.jsonl", encoding="utf-8") as lines:
        for case in map(json.loads, lines):
            greedy = case["generation_mode"] == "hybrid" and not case.get("temperature")
            if greedy and case["images"] == [file] and case["question"] == question and case["max_new_tokens"] == 256:
                boxes = [part.split("</box>")[0] for part in case["output"].split("<box>")[1:]]
                places = [[int(value) / 1000 for value in box[1:-1].split("><")] for box in boxes]
                return case["output"].removesuffix("<|im_end|>"), places
    raise LookupError(question)


def run(out, *arguments):
    code = main([*map(str, arguments), "--out", str(out), "--device", "cpu"])
    results = out / "results.json"
    return code, json.loads(results.read_text(encoding="utf-8")) if results.exists() else None


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Assembled folders go here and not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(hub.loading, "HF_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def detected(tmp_path_factory):
    """Two good pictures among bad ones, two queries, batches of three rows."""
    folder = tmp_path_factory.mktemp("detect")
    (folder / "broken.png").write_bytes((PICTURES / "000.png").read_bytes()[:60])
    Image.new("RGB", (9000, 14)).save(folder / "too-wide.png")
    sources = [
        folder / "broken.png",
        PICTURES / TRIANGLES[0],
        folder / "absent.png",
        folder / "too-wide.png",
        PICTURES / SQUARES[0],
    ]
    queries = ["--query", "yellow triangle", "--query", "orange square"]
    code, results = run(folder / "out", *sources, *queries, "--batch-size", 3)
    return folder, code, results


def assert_answers_like_the_stock(results, image, query, golden, kind):
    entry = next(entry for entry in results["images"] if entry["image"].endswith(image))
    answer = next(answer for answer in entry["answers"] if answer["query"] == query)
    text, places = stock_answer(*golden)
    assert answer["question"] == golden[1]
    assert answer["text"] == text
    assert len(places) > 0
    size = [entry["width"], entry["height"]] * 2
    pixels = [[value * side for value, side in zip(place, size, strict=False)] for place in places]
    assert [found["label"] for found in answer["detections"]] == [query] * len(places)
    for found, expected in zip(answer["detections"], pixels, strict=True):
        assert found[kind] == pytest.approx(expected, abs=0.006)


def test_good_pictures_are_answered_as_the_stock_answers_them(detected):
    _, _, results = detected
    assert_answers_like_the_stock(results, TRIANGLES[0], "yellow triangle", TRIANGLES, "box")
    assert_answers_like_the_stock(results, SQUARES[0], "orange square", SQUARES, "box")
    assert [len(entry["answers"]) for entry in results["images"]] == [2, 2]
    assert {answer["finish_reason"] for entry in results["images"] for answer in entry["answers"]} == {"end"}


def test_bad_pictures_are_named_and_the_exit_code_says_so(detected):
    folder, code, results = detected
    assert code == 1
    assert [Path(error["image"]).name for error in results["errors"]] == ["broken.png", "absent.png", "too-wide.png"]
    assert all(error["error"] for error in results["errors"])
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["030.png", "044.png", "results.json"]


def test_pictures_show_the_boxes(detected):
    folder, _, results = detected
    for entry in results["images"]:
        with Image.open(entry["image"]) as plain, Image.open(folder / "out" / entry["picture"]) as drawn:
            assert drawn.width % plain.width == 0
            same_size = plain.convert("RGB").resize(drawn.size, Image.Resampling.NEAREST)
            assert same_size.tobytes() != drawn.convert("RGB").tobytes()


def test_points_and_other_modes(tmp_path, capsys):
    picture = PICTURES / POINT[0]
    code, results = run(tmp_path, picture, "--query", "red circle", "--task", "point")
    assert code == 0
    assert_answers_like_the_stock(results, POINT[0], "red circle", POINT, "point")
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if POINT[0] in line)
    score = results["images"][0]["answers"][0]["detections"][0]["score"]
    assert 0 < score < 1 and line.endswith(f"red circle  {score:.2f}   point 14.0, 14.0")
    # An existing folder is used again, and its files are replaced
    code, results = run(tmp_path, picture, "--query", "red circle", "--mode", "slow", "--max-new-tokens", 2)
    assert code == 0
    assert results["images"][0]["answers"][0]["finish_reason"] == "limit"
    assert "cut off at --max-new-tokens" in capsys.readouterr().out
    assert results["generation_mode"] == "slow"
    assert results["task"] == "detect"
    assert results["images"][0]["answers"][0]["detections"] == []


def test_all_pictures_bad_loads_no_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locate, "load", lambda *_, **__: pytest.fail("the model is looked for"))
    code, results = run(tmp_path / "out", tmp_path / "a.png", tmp_path / "b.png", "--query", "red circle")
    assert code == 1
    assert results is None
    assert not (tmp_path / "out").exists()
    errors = capsys.readouterr().err
    assert "a.png" in errors
    assert "b.png" in errors


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "lacks config.json"), ('{"model_type": "qwen2"}', "lacks preprocessor_config.json")],
)
def test_unusable_model_gives_one_line(tmp_path, capsys, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    code, results = run(tmp_path / "out", "--model", str(tmp_path))
    assert code == 1
    assert results is None
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert "image" not in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["picture.png"], "--query is needed"),
        (["--query", " "], "--query: got an empty text"),
        (["--task", "segment"], "invalid choice: 'segment'"),
        (["--batch-size", "0"], "got '0', expected a whole number"),
        (["--out", __file__], "is a file, expected a folder"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_is_quick_and_needs_no_clone_as_working_folder(tmp_path):
    command = [sys.executable, "-X", "importtime", str(PROJECT / "locate.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--query" in done.stdout
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())


@pytest.mark.parametrize("size", [(1, 1), (30, 900), (84, 84), (5000, 700)])
@pytest.mark.parametrize("background", ["black", "white", "red"])
def test_drawing_fits_any_picture(size, background):
    width, height = size
    found = [
        Detection("red circle", (0.0, 0.0, width / 2, height / 2)),
        Detection("a label much longer than the picture is wide " * 9, (0.0, 0.0, float(width), float(height))),
        Detection("two\nlines", (width * 0.9, height * 0.9, width * 0.1, height * 0.1)),
        Detection("red circle", (width / 2, height / 2)),
        Detection("", (float(width), float(height))),
    ]
    plain = Image.new("RGB", size, background)
    colours = {}
    drawn = draw(plain, found, colours)
    assert drawn.width / width == drawn.height / height == drawn.width // width
    assert len(set(colours.values())) == len(colours) == 4
    assert plain.getcolors() == [(width * height, plain.getpixel((0, 0)))]
    shades = {colour for _, colour in drawn.getcolors(maxcolors=drawn.width * drawn.height)}
    assert colours["red circle"] in shades
    assert len(shades) > 2


@pytest.fixture
def before_generate(monkeypatch):
    """Has what the test puts in called before each batch, with the batches so far and the inputs."""
    hooks, load = [], Locator.model.func

    def loaded(locator):
        model = load(locator)
        generate, batches = model.generate, []

        def hooked(**inputs):
            for hook in hooks:
                hook(len(batches), inputs)
            batches.append(inputs)
            return generate(**inputs)

        model.generate = hooked
        return model

    model = cached_property(loaded)
    model.__set_name__(Locator, "model")
    monkeypatch.setattr(Locator, "model", model)
    return hooks


def test_a_row_that_breaks_is_told_as_such(tmp_path, before_generate, capsys):
    def break_second_row(_batches, inputs):
        first, second = inputs["image_grid_hws"].prod(1).tolist()
        inputs["pixel_values"][first : first + second] = torch.nan

    before_generate.append(break_second_row)
    options = ["--query", "yellow triangle", "--query", "red circle"]
    code, results = run(tmp_path, PICTURES / TRIANGLES[0], *options)
    assert code == 1
    assert_answers_like_the_stock(results, TRIANGLES[0], "yellow triangle", TRIANGLES, "box")
    assert [answer["finish_reason"] for answer in results["images"][0]["answers"]] == ["end", "error"]
    (error,) = results["errors"]
    assert error["image"] == str(PICTURES / TRIANGLES[0]) and error["query"] == "red circle"
    assert "NaN" in error["error"]
    told = capsys.readouterr()
    assert error["error"] in told.err and "'red circle'" in told.err and "could not be used" not in told.err
    assert "broken off by an error" in told.out and "nothing found" not in told.out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, OSError, ValueError, locate.ModelError])
def test_an_error_in_the_middle_keeps_what_is_done(tmp_path, before_generate, capsys, error):
    def fail(batches, _inputs):
        if batches == 3:
            raise error("it broke")

    before_generate.append(fail)
    sources = [PICTURES / name for name in (TRIANGLES[0], SQUARES[0], POINT[0])]
    options = ["--query", "yellow triangle", "--query", "orange square", "--batch-size", 1]
    code, results = run(tmp_path, *sources, *options)
    assert code == 1
    assert_answers_like_the_stock(results, TRIANGLES[0], "yellow triangle", TRIANGLES, "box")
    assert [len(entry["answers"]) for entry in results["images"]] == [2, 1]
    assert [entry["picture"] for entry in results["images"]] == [TRIANGLES[0], None]
    assert sorted(path.name for path in tmp_path.iterdir()) == [TRIANGLES[0], "results.json"]
    assert results["errors"] == [{"error": "it broke"}]
    told = capsys.readouterr()
    assert "locate.py: it broke" in told.err and "\n1 picture and results.json" in told.out


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, capsys):
    for name in (POINT[0], "results.json"):
        (tmp_path / name).mkdir()
    assert main([str(PICTURES / POINT[0]), "--query", "red circle", "--device", "cpu", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert "red circle" in told.out
    picture, results = told.err.splitlines()[-2:]
    assert POINT[0] in picture and "results.json" in results


def test_text_task_needs_no_query(tmp_path, monkeypatch):
    asked = []

    def answer(_self, rows, _mode, _limit, **_options):
        asked.extend(row.question for row in rows)
        return [{"text": "", "finish_reason": "end", "error": None, "detections": []} for _ in rows]

    monkeypatch.setattr(Locator, "check", lambda *_: None)
    monkeypatch.setattr(Locator, "__call__", answer)
    code, results = run(tmp_path, PICTURES / POINT[0], "--task", "text")
    assert code == 0
    assert asked == ["Detect all the text in box format."]
    assert results["images"][0]["answers"][0]["query"] == ""


def test_thresholds_repetitions_and_labels_reach_the_model(tmp_path, monkeypatch):
    from upload_to_hub import main as assemble_main

    folder = tmp_path / "early"
    early = PROJECT / "tests" / "goldens" / "shapes-early"
    assert assemble_main(["--base", str(early / "checkpoint"), "--local-dir", str(folder)]) == 0
    case = json.loads((early / "cases.jsonl").read_text(encoding="utf-8").splitlines()[0])
    picture, query = early / "images" / case["images"][0], "green circle"
    said = {}
    for name, options in {
        "cut": ["--mode", "fast"],
        "whole": ["--mode", "fast", "--keep-repetitions"],
        "sure": ["--mode", "fast", "--keep-repetitions", "--threshold", "0.5"],
        "labels": ["--verify-labels"],
        "verified": ["--mode", "verified"],
        "slow": ["--mode", "slow"],
    }.items():
        code, results = run(tmp_path / name, picture, "--query", query, "--model", folder, *options)
        assert code == 0
        said[name] = results["images"][0]["answers"][0]
    assert said["whole"]["text"].startswith(said["cut"]["text"]) and said["whole"]["text"] != said["cut"]["text"]
    scores = [found["score"] for found in said["whole"]["detections"]]
    assert [found["score"] for found in said["sure"]["detections"]] == [score for score in scores if score >= 0.5]
    assert said["verified"]["text"] == said["slow"]["text"]
    assert said["labels"]["text"]


@pytest.mark.parametrize("threshold", ["2", "-0.1", "high", "nan"])
def test_a_threshold_is_a_share(tmp_path, threshold, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, PICTURES / POINT[0], "--query", "x", "--threshold", threshold)
    assert f"got '{threshold}', expected a number from 0 to 1" in capsys.readouterr().err


def test_many_labels_keep_apart_in_colour():
    found = [Detection(str(number), (1.0, 1.0)) for number in range(40)]
    colours = {}
    draw(Image.new("RGB", (400, 400)), found, colours)
    assert len(set(colours.values())) == 40


def test_file_names_do_not_collide():
    encoded = "data:image/png;base64," + base64.b64encode(b"x").decode()
    sources = ["a/photo.jpg", "b/Photo.png", "https://host/x/photo.webp?size=big", encoded, "dir/"]
    assert locate._file_names(sources) == ["photo.png", "Photo-2.png", "photo-3.png", "image.png", "dir.png"]


@pytest.mark.parametrize(
    ("pictures", "out"),
    [
        (["{}/a.png"], "{}"),
        (["{}/a.png"], "{}/../pictures/."),
        (["{}/b.jpg"], "{}"),  # whose a.png of an earlier run may be someone's picture
        (["{}/b.jpg", "{}/a.png"], "{}/link"),
        (["file://{}/a.png"], "{}"),
        (["file://{}/a%2Epng"], "{}"),
        (["{}/link/a.png"], "{}"),
        (["{}/../elsewhere/a.png"], "{}/hard"),
        (["{}/../elsewhere/a.png"], "{}/soft"),
        (["{}/../elsewhere/../pictures/soft/A.PNG"], "{}/SOFT"),
        (["https://host/c.png", "data:,x", "{}/a.png"], "{}"),
    ],
)
def test_no_picture_is_overwritten(tmp_path, pictures, out, capsys, monkeypatch):
    monkeypatch.setattr(locate, "load", lambda *_, **__: pytest.fail("the model is looked for"))
    monkeypatch.setattr(locate, "_read", lambda *_: pytest.fail("pictures are read"))
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for path in (folder, elsewhere, folder / "hard", folder / "soft"):
        path.mkdir()
    for path in (folder / "a.png", folder / "b.jpg", elsewhere / "a.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "link").symlink_to(folder)
    (folder / "soft" / "a.png").symlink_to(elsewhere / "a.png")
    (folder / "hard" / "a.png").hardlink_to(elsewhere / "a.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.???") if path.is_file()}
    with pytest.raises(SystemExit) as caught:
        main([*(picture.format(folder) for picture in pictures), "--query", "x", "--out", out.format(folder)])
    assert caught.value.code == 2
    assert "--out: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.???") if path.is_file()} == before


def test_turned_photos_are_upright_in_all_that_is_written(tmp_path):
    """A picture stored lying on its side gives the results of the same picture stored as it is seen."""
    seen = Image.open(PICTURES / POINT[0]).convert("RGB")
    seen = seen.crop((0, 0, seen.width, seen.height - 10))
    seen.save(tmp_path / "seen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    seen.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    code, results = run(tmp_path / "out", tmp_path / "seen.png", tmp_path / "turned.png", "--query", "red circle")
    assert code == 0
    first, second = results["images"]
    assert (first["width"], first["height"]) == (second["width"], second["height"]) == seen.size
    assert first["answers"] == second["answers"] and first["answers"][0]["detections"]
    drawn = [Image.open(tmp_path / "out" / each["picture"]) for each in results["images"]]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert drawn[0].width * seen.height == drawn[0].height * seen.width
    assert not any(image.getexif() for image in drawn)


def test_credentials_are_not_told(tmp_path, capfd):
    code, results = run(tmp_path, "http://user:SECRET@127.0.0.1:1/x.png?token=SECRET", "--query", "red circle")
    assert code == 1 and results is None
    told = capfd.readouterr()
    assert "127.0.0.1:1/x.png" in told.err and "SECRET" not in told.err + told.out


@pytest.mark.parametrize("missing", ["huggingface_hub", "PIL", "torch"])
def test_outside_of_its_environment_one_line_says_what_to_do(tmp_path, missing):
    (tmp_path / missing).mkdir()
    (tmp_path / missing / "__init__.py").write_text(f'raise ModuleNotFoundError("No module named {missing!r}")')
    command = [sys.executable, str(PROJECT / "locate.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert missing in line and "make demo" in line and "source .venv/default/bin/activate" in line


def test_table_has_a_line_for_everything():
    picture = locate.Picture("p.png", "p.png", Image.new("RGB", (1, 1)), (1, 1))
    found = [Detection("l", (1.0, 2.0, 3.0, 4.06), 0.256), Detection("m", (5.0, 6.0))]
    picture.rows = [
        {"query": "q", "finish_reason": "limit", "detections": found},
        {"query": "absent", "finish_reason": "end", "detections": []},
        {"query": "broken", "finish_reason": "error", "detections": []},
    ]
    lines = [line.split("  ") for line in table([picture]).splitlines()]
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    assert cells[0] == ["image", "query", "label", "score", "pixels"]
    assert cells[2] == ["p.png", "q", "l", "0.26", "box 1.0, 2.0, 3.0, 4.1"]
    assert cells[3] == ["p.png", "q", "m", "point 5.0, 6.0"]
    assert cells[4] == ["p.png", "q", "-", "cut off at --max-new-tokens"]
    assert cells[5] == ["p.png", "absent", "-", "nothing found"]
    assert cells[6:] == [["p.png", "broken", "-", "broken off by an error"]]
