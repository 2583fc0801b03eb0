"""scan() and locate.py: sources to records to a folder, on the demo checkpoint, and everything that goes wrong."""

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import locate
from scan import drawing, sources
from scan.formats import Picture
from scan.records import Detection, Record, Results, read_manifest, read_records
from scan.workers import draw_pictures, scan

from .conftest import model_of, processor_of

PROJECT = Path(__file__).resolve().parent.parent
GOLDENS = PROJECT / "tests" / "goldens" / "shapes"
PICTURES = GOLDENS / "images"
# (picture, task, query): what the stock model answered, found in cases.jsonl by the question
TRIANGLES = ("044.png", "Locate all the instances that matches the following description: yellow triangle.")
SQUARES = ("030.png", "Locate all the instances that matches the following description: orange square.")
POINT = ("012.png", "Point to: red circle.")
QUERIES = ["yellow triangle", "orange square"]


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


@pytest.fixture(scope="module")
def loaded():
    return model_of("shapes"), processor_of()


@pytest.fixture
def run(tmp_path, monkeypatch, loaded):
    """Calls the command line in a folder of its own; returns the exit code and the records."""
    monkeypatch.setattr("hub.engine_process.load_apart", lambda *_, **__: loaded)
    monkeypatch.setattr("gc.freeze", lambda: None)  # for what other tests have left
    monkeypatch.chdir(tmp_path)

    def call(*arguments, out="out"):
        code = locate.main([*map(str, arguments), "--out", str(out)])
        return code, list(read_records(out)) if Path(out).exists() else []

    return call


def asking(*queries):
    return [word for query in queries for word in ("--query", query)]


def plain(records):
    """What does not depend on time, in an order of its own."""
    return sorted(
        (replace(record, seconds=None) for record in records), key=lambda r: (r.source, r.frame or 0, r.query)
    )


def assert_answers_like_the_stock(record, golden, kind):
    text, places = stock_answer(*golden)
    assert (record.status, record.finish_reason, record.text) == ("ok", "end", text)
    assert len(places) > 0
    pixels = [[v * side for v, side in zip(at, [record.width, record.height] * 2, strict=False)] for at in places]
    assert [found.label for found in record.detections] == [record.query] * len(places)
    for found, expected in zip(record.detections, pixels, strict=True):
        assert getattr(found, kind) == pytest.approx(expected, abs=0.006)
        assert 0 < found.score < 1 and 0 < found.label_score <= 1


# ---- as a library


def test_a_query_that_the_processor_refuses_is_refused_before_the_scan(loaded):
    model, processor = loaded
    with pytest.raises(ValueError, match="im_end"):
        next(scan([PICTURES / "000.png"], ["<|im_end|>"], model=model, processor=processor))


def test_scan_answers_as_the_stock_does(loaded):
    model, processor = loaded
    found = list(
        scan([PICTURES / TRIANGLES[0], str(PICTURES / SQUARES[0])], QUERIES, model=model, processor=processor)
    )
    answers = {(Path(record.source).name, record.query): record for record in found}
    assert len(answers) == len(found) == 4
    assert_answers_like_the_stock(answers[TRIANGLES[0], QUERIES[0]], TRIANGLES, "box")
    assert_answers_like_the_stock(answers[SQUARES[0], QUERIES[1]], SQUARES, "box")
    assert {one.class_id for one in answers[SQUARES[0], QUERIES[1]].detections} == {1}
    assert all(record.seconds > 0 and record.tokens > 2 and record.mode == "hybrid" for record in found)


def test_lists_ask_their_own_questions(loaded, tmp_path):
    model, processor = loaded
    said = [{"type": "image_url", "image_url": {"url": str(PICTURES / POINT[0])}}]
    lines = [
        {"image": str(PICTURES / TRIANGLES[0]), "query": "red circle</c>yellow triangle"},
        *(
            {
                "custom_id": name,
                "body": {"messages": [{"role": "user", "content": [*said, {"type": "text", "text": text}]}]},
            }
            for name, text in (("a", POINT[1]), ("b", POINT[1]), ("c", "What is this?"), ("d", "<|im_end|>"))
        ),
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = list(scan([str(tmp_path / "list.jsonl")], model=model, processor=processor, max_new_tokens=32))
    answers = {(record.id, record.query): record for record in found}
    assert len(answers) == len(found) == 6
    triangle = answers[None, "yellow triangle"]
    assert_answers_like_the_stock(triangle, TRIANGLES, "box")
    assert [one.class_id for one in triangle.detections] == [1] * len(triangle.detections)
    for name in ("a", "b"):
        assert_answers_like_the_stock(answers[name, "red circle"], POINT, "point")
        assert answers[name, "red circle"].task == "point"
    assert answers["c", "What is this?"].task == "prompt" and answers["c", "What is this?"].status == "ok"
    assert "im_end" in answers["d", "<|im_end|>"].error


def test_a_bad_question_or_picture_fails_alone(loaded, tmp_path, monkeypatch):
    model, processor = loaded
    (tmp_path / "broken.png").write_bytes((PICTURES / "000.png").read_bytes()[:60])
    Image.new("RGB", (9000, 14)).save(tmp_path / "too-wide.png")
    Image.new("RGB", (1400, 1400)).save(tmp_path / "too-long.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "crash.png")
    load = sources.Item.load
    monkeypatch.setattr(sources.Item, "load", lambda item: 1 / 0 if "crash" in item.source else load(item))
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 1024)
    names = ["broken.png", "too-wide.png", "absent.png", "too-long.png", "crash.png"]
    line = {"image": str(PICTURES / TRIANGLES[0]), "query": [QUERIES[0], "a <|im_start|>user"]}
    (tmp_path / "list.jsonl").write_text(json.dumps(line))
    everything = [*(str(tmp_path / name) for name in [*names, "list.jsonl"]), "nothing*.png"]
    queries = [QUERIES[0], "b"]
    found = list(scan(everything, queries, model=model, processor=processor, max_new_tokens=256))
    answers = {(Path(record.source).name, record.query): record for record in found}
    assert len(answers) == len(found) == 14
    assert_answers_like_the_stock(answers.pop((TRIANGLES[0], QUERIES[0])), TRIANGLES, "box")
    assert {record.status for record in answers.values()} == {"error"}
    for name, told in zip(
        [*names, TRIANGLES[0]], ["read", "9000", "no such file", "1024", "zero", "im_start"], strict=True
    ):
        error = answers[name, "a <|im_start|>user" if name == TRIANGLES[0] else queries[0]].error
        assert told in error and "images[0]" not in error and "row 0" not in error
    assert answers["too-long.png", queries[0]].width == 1400


def test_shares_of_processes_make_the_whole_and_no_question_is_asked_twice(loaded):
    model, processor = loaded
    given = {"model": model, "processor": processor, "max_new_tokens": 16}
    everything = [str(PICTURES / f"{number:03}.png") for number in range(5)]
    whole = list(scan([*everything, everything[0]], QUERIES[:1], **given))
    assert len(whole) == 5  # the same question is asked once
    shares = [list(scan(everything, QUERIES[:1], process=number, processes=3, **given)) for number in range(3)]
    assert [len(share) for share in shares] == [2, 2, 1]
    assert plain(record for share in shares for record in share) == plain(whole)


def test_a_scan_reads_no_further_ahead_than_it_must(loaded, monkeypatch):
    model, processor = loaded
    taken = []

    def endless():
        while True:
            taken.append(PICTURES / f"{len(taken) % 40:03}.png")
            yield Image.open(taken[-1])

    records = scan(endless(), ["red circle"], model=model, processor=processor, max_batch_rows=4)
    for _ in range(20):
        next(records)
    records.close()
    assert len(taken) < 150


# ---- the command line


def test_a_folder_becomes_lines_drawings_and_a_table(run, tmp_path, capsys):
    for name in (TRIANGLES[0], SQUARES[0]):
        shutil.copy(PICTURES / name, tmp_path / name)
    code, records = run(".", *asking(*QUERIES))
    assert code == 0 and len(records) == 4
    told = capsys.readouterr()
    assert "nothing found" in told.out or all(record.detections for record in records)
    assert "./044.png" in told.out and "no --model" in told.err
    sums = [line.split("  ") for line in told.out.splitlines() if line.startswith("yellow triangle  ")]
    boxes = sum(len(record.detections) for record in records if record.query == QUERIES[0])
    assert [cell.strip() for cell in sums[-1] if cell.strip()][1:4:2] == ["2", str(boxes)]
    assert sorted(path.name for path in (tmp_path / "out" / "drawn").iterdir()) == ["030.png", "044.png"]
    with Image.open(tmp_path / "out" / "drawn" / "044.png") as drawn, Image.open(TRIANGLES[0]) as source:
        assert drawn.size == source.size and drawn.convert("RGB").tobytes() != source.convert("RGB").tobytes()
    settings = read_manifest("out")["settings"]
    assert settings["queries"] == QUERIES and settings["mode"] == "hybrid"
    # the same again asks nothing, also as the folder has more in it now
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert run(".", *asking(*QUERIES)) == (0, records)
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_points_limits_and_restart(run, capsys):
    picture = PICTURES / POINT[0]
    code, (record,) = run(picture, *asking("red circle"), "--task", "point")
    assert code == 0
    assert_answers_like_the_stock(record, POINT, "point")
    assert f"red circle  {record.detections[0].score:.2f}   point 14.0, 14.0" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        run(picture, *asking("red circle"), "--mode", "slow", "--task", "point")
    assert caught.value.code == 2 and "mode: got 'slow'" in capsys.readouterr().err
    code, (record,) = run(picture, *asking("red circle"), "--mode", "slow", "--max-new-tokens", 2, "--restart")
    assert (code, record.finish_reason, record.mode, record.task) == (0, "limit", "slow", "detect")
    assert "cut off at --max-new-tokens" in capsys.readouterr().out
    assert read_manifest("out")["settings"]["mode"] == "slow"


def test_exports_any_time_later(run, monkeypatch, capsys):
    assert run(PICTURES / POINT[0], *asking("red circle"))[0] == 0
    monkeypatch.setattr("hub.engine_process.load_apart", lambda *_, **__: pytest.fail("the model is loaded"))
    shutil.rmtree("out/drawn")
    assert run("--format", "csv,coco")[0] == 0
    assert json.loads(Path("out/coco/annotations.json").read_text())["categories"][0]["name"] == "red circle"
    assert Path("out/csv").is_dir() and Path("out/drawn/012.png").is_file()
    with pytest.raises(SystemExit):
        run("--format", "csv,png")
    assert "got 'png'" in capsys.readouterr().err


def test_a_query_of_marks_is_a_usage_error(run, capsys):
    assert run(PICTURES / "000.png", PICTURES / "001.png", *asking("red circle", "<|im_end|>")) == (2, [])
    assert not Path("out").exists()
    assert capsys.readouterr().err.count("<|im_end|>") == 1


def test_credentials_of_sources_stay_in_the_command_line(run, monkeypatch):
    """The picture is opened with them, and drawn; later it cannot be, as nothing keeps them."""
    with Image.open(PICTURES / POINT[0]) as picture:
        picture.load()
    opened = []
    monkeypatch.setattr("image_processing.load_image", lambda image, **_: (opened.append(image), picture)[1])
    url = "http://user:SECRET@host/x.png?token=SECRET"
    code, (record,) = run(url, *asking("red circle"))
    assert code == 0 and set(opened) == {url} and record.source.startswith("http://host/x.png#")
    assert not any(b"SECRET" in path.read_bytes() for path in Path("out").rglob("*") if path.is_file())
    drawn = list(Path("out/drawn").iterdir())
    assert len(drawn) == 1
    assert run(url, *asking("red circle")) == (0, [record])
    drawn[0].unlink()
    assert run("--format", "csv")[0] == 0
    assert not list(Path("out/drawn").iterdir()) and set(opened) == {url}


def test_of_a_scan_before_what_was_exported_and_drawn_is_told(run, capsys):
    picture = PICTURES / POINT[0]
    assert run(picture, *asking("red circle"), "--format", "csv,coco")[0] == 0
    assert "before" not in capsys.readouterr().err
    assert run(picture, *asking("blue triangle"), "--restart", "--format", "csv")[0] == 0
    assert "drawn, coco, csv in out: of the scan before" in capsys.readouterr().err


@pytest.mark.slow
def test_drawing_holds_few_answers(tmp_path, monkeypatch):
    """Each picture's answers are read when its turn has come, whatever some pictures have none."""
    manifest = {"model": "m", "sources": ["a"], "settings": {"queries": ["q"]}}
    results, paths = Results(tmp_path / "out", manifest), [str(tmp_path / f"{number}.png") for number in range(300)]
    Image.new("RGB", (8, 8)).save(paths[0])
    for number, path in enumerate(paths):
        Path(path).hardlink_to(paths[0]) if number else None
        found = (Detection("q", 0, (1.0, 1.0, 5.0, 5.0)),)
        if number % 10:
            results.write(Record(path, None, None, "q", "detect", "ok", None, 8, 8, found))
        else:
            results.write(Record(path, None, None, "q", "detect", "error", "broken"))
    results.close()
    held, draw = [], drawing.draw

    def counting(image, detections, colours):
        if image.size != (1, 1) and len(held) < 20:
            held.append(sum(type(one) is Picture for one in gc.get_objects()))
        return draw(image, detections, colours)

    monkeypatch.setattr(drawing, "draw", counting)
    assert list(draw_pictures(tmp_path / "out", [*paths, paths[1]])) == [None] * 270
    assert len(held) >= 20 and max(held) < 60
    assert len(list((tmp_path / "out" / "drawn").iterdir())) == 270


def test_paths_from_the_standard_input(run, monkeypatch, capsys):
    for number in range(2):
        given = f"{PICTURES / POINT[0]}\n{PICTURES / TRIANGLES[0]}\n".encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given if number == 0 else b"")))
        code, records = run(*(["-", *asking("red circle")] if number == 0 else ["--draw"]))
        assert code == 0 and len(records) == 2
        assert sorted(path.name for path in Path("out/drawn").iterdir()) == [POINT[0], TRIANGLES[0]]
        shutil.rmtree("out/drawn")


def test_failed_questions_are_told_and_retried(run, tmp_path, capsys):
    for number in range(14):
        (tmp_path / f"{number}.png").write_bytes(b"broken")
    code, records = run(*(f"{number}.png" for number in range(14)), *asking("red circle"))
    assert code == 1 and {record.status for record in records} == {"error"} and len(records) == 14
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if "not an image" in line]) == locate.TOLD_ERRORS
    for number in range(13):
        shutil.copy(PICTURES / POINT[0], tmp_path / f"{number}.png")
    assert run(*(f"{number}.png" for number in range(14)), *asking("red circle")) == (1, records)
    code, records = run(*(f"{number}.png" for number in range(14)), *asking("red circle"), "--retry-failed")
    assert code == 1 and sorted(record.status for record in records) == ["error"] + ["ok"] * 13


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (RuntimeError("CUDA error: device-side assert"), 1, "device-side"),
    ],
)
def test_what_stops_a_scan_keeps_what_is_written_and_says_how_to_go_on(run, monkeypatch, capsys, error, code, told):
    write, arguments = Results.write, [*(PICTURES / f"{n:03}.png" for n in range(4)), *asking("red circle")]

    def stop(results, record):
        if len(results.path.read_bytes().splitlines()) == 2:
            raise error
        write(results, record)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", stop)
        stopped, records = run(*arguments)
    assert stopped == code and len(records) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any(told in line for line in lines) and "To go on: locate.py" in lines[-1] and "--out out" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    code, whole = run(*arguments)
    assert code == 0 and len(whole) == 4 and whole[:2] == records


def test_an_engine_that_dies_fails_no_question(run, loaded, monkeypatch, capsys):
    """After a device's error the rows in flight come out as failed; they are asked again by the same command."""
    generate_batch = loaded[0].generate_batch

    def dying(rows, **settings):
        for number, output in enumerate(generate_batch(rows, **settings)):
            yield output if number < 2 else replace(output, error="CUDA error: an illegal memory access")
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    arguments = [*(PICTURES / f"{n:03}.png" for n in range(4)), *asking("red circle")]
    with monkeypatch.context() as patch:
        patch.setattr(loaded[0], "generate_batch", dying)
        code, records = run(*arguments)
    assert code == 1 and [record.status for record in records] == ["ok", "ok"]
    assert "illegal memory access" in capsys.readouterr().err
    assert [record.status for record in run(*arguments)[1]] == ["ok"] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["picture.png"], "--query is needed"),
        (["--query", " "], "--query: got an empty text"),
        (["--query", "a</c>"], "--query: got an empty text"),
        (["--task", "segment"], "invalid choice: 'segment'"),
        (["--batch-size", "0"], "got '0', expected a whole number"),
        (["--threshold", "nan"], "got 'nan', expected a number from 0 to 1"),
        (["--threshold", "2"], "got '2', expected a number from 0 to 1"),
        (["--fps", "inf", "v.mp4"], "got 'inf', expected a number"),
        (["--queries", "absent.txt"], "absent.txt"),
        (["--list", "absent.txt", "--query", "x"], "absent.txt"),
        (["--query", "a\udcff"], "--query: got 'a\\udcff', expected UTF-8"),
        (["--out", "nowhere", "--format", "coco"], "--out: nowhere is no scan's folder"),
        (["--out", "nowhere", "--draw"], "--out: nowhere is no scan's folder"),
        (["--out", __file__], "out: "),
        (["--format", "png"], "got 'png', expected some of"),
    ],
)
def test_usage_errors(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        locate.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "out"),
    [
        (["{}/a.png"], "{}"),
        (["{}/a.png"], "{}/../pictures/."),
        (["{}/b.jpg"], "{}"),
        (["{}/b.jpg", "{}/a.png"], "{}/link"),
        (["file://{}/a.png"], "{}"),
        (["{}/link/a.png"], "{}"),
        (["{}"], "{}"),
        (["{}/../elsewhere/a.png"], "{}/hard"),
        (["{}/../elsewhere/a.png"], "{}/soft"),
        (["https://host/c.png", "data:,x", "{}/a.png"], "{}"),
        (["{}/new/a.png"], "{}/new"),
        (["--list", "{}/b.jpg"], "{}"),
    ],
)
def test_no_input_is_overwritten(tmp_path, given, out, capsys, monkeypatch):
    monkeypatch.setattr("hub.engine_process.load_apart", lambda *_, **__: pytest.fail("the model is looked for"))
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for path in (folder, elsewhere, folder / "hard", folder / "soft"):
        path.mkdir()
    for path in (folder / "a.png", folder / "b.jpg", elsewhere / "a.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "link").symlink_to(folder)
    (folder / "soft" / "a.png").symlink_to(elsewhere / "a.png")
    (folder / "hard" / "a.png").hardlink_to(elsewhere / "a.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.???") if path.is_file()}
    for more in ([], ["--restart"]):
        with pytest.raises(SystemExit) as caught:
            locate.main([*(each.format(folder) for each in given), "--query", "x", "--out", out.format(folder), *more])
        assert caught.value.code == 2
        assert "out: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.???") if path.is_file()} == before


def test_a_picture_among_the_drawings_is_not_drawn_over(run, tmp_path, capsys):
    """Of a list it is known late that it leads into the folder of the results."""
    (tmp_path / "list").write_text("out/drawn/012.png")
    assert run("--list", "list", *asking("red circle"))[0] == 1  # not there yet
    (tmp_path / "out" / "drawn").mkdir()
    shutil.copy(PICTURES / POINT[0], tmp_path / "out" / "drawn")
    code, (record,) = run("--list", "list", *asking("red circle"), "--retry-failed")
    assert code == 0 and record.status == "ok"
    assert "drawn/012.png: is a picture of the scan's" in capsys.readouterr().err
    assert (tmp_path / "out" / "drawn" / "012.png").read_bytes() == (PICTURES / POINT[0]).read_bytes()


def test_a_drawing_that_cannot_be_written_is_told(run, capsys):
    assert run(PICTURES / POINT[0], PICTURES / TRIANGLES[0], *asking("red circle"))[0] == 0
    for name in (POINT[0], TRIANGLES[0]):
        Path("out/drawn", name).unlink()
    Path("out/drawn/044.png/x").mkdir(parents=True)
    code, records = run("--draw")
    assert code == 0 and len(records) == 2
    assert "044.png" in capsys.readouterr().err and Path("out/drawn/012.png").is_file()


def test_a_terminal_that_knows_few_letters(run, tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9 \xff.png")
    shutil.copy(PICTURES / POINT[0], tmp_path / name)
    (tmp_path / "é-bad.png").write_bytes(b"")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code, records = run(".", *asking("círculo 円"))
    assert code == 1
    assert {record.source: record.status for record in records} == {f"./{name}": "ok", "./é-bad.png": "error"}
    out.flush(), err.flush()
    assert b"c\\xedrculo" in out.buffer.getvalue() and b"\\xe9-bad.png" in err.buffer.getvalue()


def test_text_task_needs_no_query(run):
    code, (record,) = run(PICTURES / POINT[0], "--task", "text", "--max-new-tokens", 8)
    assert code == 0 and (record.query, record.task) == ("", "text")
    assert all(found.class_id == -1 for found in record.detections)


def test_options_reach_the_engine(run, loaded, monkeypatch):
    seen, generate_batch = {}, loaded[0].generate_batch
    spy = lambda rows, **settings: (seen.update(settings), generate_batch(rows, **settings))[1]  # noqa: E731
    monkeypatch.setattr(loaded[0], "generate_batch", spy)
    picture = [PICTURES / TRIANGLES[0], *asking(QUERIES[0])]
    _, (record,) = run(*picture, "--mode", "fast", "--verify-labels", "--batch-size", 3, "--max-new-tokens", 99)
    assert seen["generation_mode"] == "fast" and seen["verify_labels"] and seen["max_new_tokens"] == 99
    assert seen["max_batch_rows"] == 3 and len(seen["stopping_criteria"]) == 1
    least = min(found.score for found in record.detections)
    run(*picture, "--keep-repetitions", "--threshold", least + 0.001, out="sure")
    assert seen["stopping_criteria"] == []
    (sure,) = read_records("sure")
    assert len(sure.detections) < len(record.detections)


def test_unusable_model_gives_one_line(tmp_path, capsys):
    assert locate.main(["--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "lacks config.json" in line and not (tmp_path / "out").exists()


def test_help_is_quick_and_needs_no_clone_as_working_folder(tmp_path):
    for arguments, code in ((["--help"], 0), (["x.png"], 2), (["x.png", "--query", "x", "--out", "."], 2)):
        (tmp_path / "x.png").touch()
        command = [sys.executable, "-X", "importtime", str(PROJECT / "locate.py"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code
        assert not any(line.split("|")[-1].strip() in ("torch", "ray", "av") for line in done.stderr.splitlines())


def test_an_actors_engine_refuses_a_row_alone(loaded, monkeypatch):
    import pickle

    from scan.ray import Engine

    monkeypatch.setattr("hub.loading.load", lambda *args, **options: loaded)
    settings = {"max_new_tokens": 8, "generation_mode": "hybrid"}
    asked = {"queries": ["red circle", "red circle " * 9000, "blue circle"], "task": "detect"}
    engine = Engine(folder=os.getcwd(), model="any", loading=None, done=set(), settings=settings, **asked)
    items = list(sources.read_items([str(PICTURES / "012.png")]))
    records = pickle.loads(engine({"items": [pickle.dumps(items)]})["records"][0])
    engine.manager.stop()
    assert sorted(record.status for record in records) == ["error", "ok", "ok"]
    assert any("length limit" in (record.error or "") for record in records)


@pytest.mark.parametrize("importing", ["tqdm", "torch"])
def test_ctrl_c_while_it_imports(tmp_path, importing):
    """transformers takes it for a missing package."""
    (tmp_path / importing).mkdir()
    slow = "try: print('here', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: raise ImportError('half')"
    (tmp_path / importing / "__init__.py").write_text(f"import time\n{slow}")
    command = [sys.executable, str(PROJECT / "locate.py"), "--out", str(tmp_path / "out")]
    given = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **given) as process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"") and process.returncode == 130


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
