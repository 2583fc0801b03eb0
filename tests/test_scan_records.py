"""scan/records.py: lines that are whole or not there, parts that merge, folders that are not mixed."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from scan import records
from scan.records import Detection, Record, Results, check, parts, read_manifest, read_records

MANIFEST = {"model": "m", "revision": "1", "sources": ["a"], "settings": {"mode": "fast", "queries": ["q"]}}
FOUND = (Detection("é\n", 0, (1.0, 2.0, 3.0, 4.5), None, 0.5, 1.0), Detection("", -1, None, (1.0, 2.0)))
RECORD = Record(
    "é \udcff\u2028.png", 3, 0.125, "q", "detect", "ok", None, 4, 5, FOUND, "<box>", "end", 7, "fast", 0.5, "x"
)


def numbered(count, **told):
    return [replace(RECORD, source=f"{number}.png", **told) for number in range(count)]


def test_a_line_holds_a_record_whole(tmp_path):
    results = Results(tmp_path / "out", MANIFEST)
    results.write(RECORD)
    assert results.close()
    (line,) = (tmp_path / "out" / "results.jsonl").read_bytes().splitlines()
    assert Record.from_json({**json.loads(line.decode("utf-8")), "later": 1}) == RECORD
    assert list(read_records(tmp_path / "out")) == [RECORD]
    assert list(json.loads(line)) == list(Record.__dataclass_fields__)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_line_is_mended_and_its_question_is_asked_again(tmp_path, cut):
    results = Results(tmp_path, MANIFEST)
    for record in numbered(3):
        results.write(record)
    results.close()
    path = tmp_path / "results.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    assert list(read_records(tmp_path)) == numbered(2)
    results = Results(tmp_path, MANIFEST)
    assert results.done == {record.key for record in numbered(2)}
    results.write(numbered(3)[2])
    results.close()
    assert list(read_records(tmp_path)) == numbered(3)


def test_a_line_that_finds_no_room_is_taken_back_whole(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file, self.room = file, 700

        def write(self, line):
            if not self.room:
                raise OSError(28, "No space left on device")
            written = self.file.write(line[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    results = Results(tmp_path, MANIFEST)
    file, results._file = results._file, Full(results._file)
    first, second = numbered(2)
    results.write(first)
    with pytest.raises(OSError, match="No space"):
        results.write(second)
    assert second.key not in results.done
    results._file = file
    results.write(second)  # there is room again
    results.close()
    assert list(read_records(tmp_path)) == [first, second]


def test_parts_merge_when_the_last_process_ends(tmp_path):
    one, other = (Results(tmp_path, MANIFEST, process, 2) for process in (0, 1))
    for number, record in enumerate(numbered(6)):
        (one, other)[number % 2].write(record)
    assert {record.source for record in read_records(tmp_path)} == {f"{number}.png" for number in range(6)}
    assert not one.close()
    assert len(parts(tmp_path)) == 2
    assert other.close()
    assert [path.name for path in parts(tmp_path)] == ["results.jsonl"]
    assert sorted(record.source for record in read_records(tmp_path)) == [f"{number}.png" for number in range(6)]


def test_a_process_that_starts_late_waits_for_another_that_merges(tmp_path, monkeypatch):
    first = Results(tmp_path, MANIFEST, 0, 2)
    first.write(RECORD)
    merge, late = records.merge, []

    def merging(folder):
        late.append(pool.submit(Results, tmp_path, MANIFEST, 1, 2))
        with pytest.raises(TimeoutError):
            late[0].result(timeout=0.2)
        merge(folder)

    monkeypatch.setattr(records, "merge", merging)
    with ThreadPoolExecutor() as pool:
        assert first.close()
        assert late[0].result().done == {RECORD.key}


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_any_number_of_processes_goes_on_with_parts_that_were_left(tmp_path, processes):
    """As after SIGKILL: three parts, one of them torn, and a line that a merge has copied already."""
    for process in range(3):
        results = Results(tmp_path, MANIFEST, process, 3)
        for record in numbered(9)[process::3]:
            results.write(record)
        results._file.close()
        results._lock.close()
    os.truncate(tmp_path / "results-2.jsonl", (tmp_path / "results-2.jsonl").stat().st_size - 9)
    (tmp_path / "results.jsonl").write_bytes((tmp_path / "results-0.jsonl").read_bytes())
    opened = [Results(tmp_path, MANIFEST, process, processes) for process in range(processes)]
    assert [each.done for each in opened] == [{record.key for record in numbered(8)}] * processes
    opened[0].write(numbered(9)[8])
    assert [each.close() for each in opened] == [False] * (processes - 1) + [True]
    assert [path.name for path in parts(tmp_path)] == ["results.jsonl"]
    assert sorted(read_records(tmp_path), key=lambda record: record.source) == numbered(9)


def test_failed_questions_are_asked_again_if_told_and_their_answers_count(tmp_path):
    results = Results(tmp_path, MANIFEST)
    good, bad = numbered(2)
    results.write(good)
    results.write(replace(bad, status="error", error="broken"))
    results.close()
    assert Results(tmp_path, MANIFEST).close()
    results = Results(tmp_path, MANIFEST, retry_failed=True)
    assert results.done == {good.key}
    results.write(bad)
    results.close()
    assert list(read_records(tmp_path)) == [good, bad]
    assert len((tmp_path / "results.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_two_scans_at_once_are_refused(tmp_path, processes):
    results = Results(tmp_path, MANIFEST, 0, processes)
    with pytest.raises(BlockingIOError, match="out: "):
        Results(tmp_path, MANIFEST, 0, processes)
    with pytest.raises(BlockingIOError, match="out: "):
        Results(tmp_path, MANIFEST)
    results.close()
    assert Results(tmp_path, MANIFEST).close()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model": "n"}, "model"),
        ({"sources": ["a", "b"]}, "sources"),
        ({"revision": "2"}, "revision"),
        ({"settings": {"mode": "slow", "queries": ["q"]}}, "mode"),
        ({"settings": {"mode": "fast", "queries": ["q" * 9000]}}, "queries"),
        ({"settings": {"mode": "fast", "queries": ["q"], "fps": 2}}, "fps"),
    ],
)
def test_other_settings_over_an_old_folder_are_refused_by_name(tmp_path, change, name):
    results = Results(tmp_path, MANIFEST)
    results.write(RECORD)
    results.close()
    with pytest.raises(ValueError, match=f"^{name}: got ") as caught:
        Results(tmp_path, {**MANIFEST, **change})
    assert len(str(caught.value)) < 400
    check(tmp_path, {**MANIFEST, "revision": None})  # not known before the model is loaded
    assert list(read_records(tmp_path)) == [RECORD]
    results = Results(tmp_path, {**MANIFEST, **change}, restart=True)
    assert results.done == set()
    results.close()
    check(tmp_path, {**MANIFEST, **change})


def test_a_folder_of_others_is_refused_and_left(tmp_path):
    (tmp_path / "results.jsonl").write_text("mine")
    for content in ("{}", '{"kind": "theirs"}', "no JSON"):
        with pytest.raises(ValueError, match=r"^out: "):
            Results(tmp_path, MANIFEST)
        (tmp_path / "manifest.json").write_text(content)
        for restart in (False, True):
            with pytest.raises(ValueError, match=r"manifest\.json: "):
                Results(tmp_path, MANIFEST, restart=restart)
        (tmp_path / "manifest.json").unlink()
    assert (tmp_path / "results.jsonl").read_text() == "mine"
    with pytest.raises(ValueError, match=r"^out: "):
        Results(tmp_path / "results.jsonl", MANIFEST)
    with pytest.raises(FileNotFoundError):
        read_manifest(tmp_path)


def test_a_line_of_others_is_named(tmp_path):
    Results(tmp_path, MANIFEST).close()
    (tmp_path / "results.jsonl").write_text('{"no": "record"}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1"):
        list(read_records(tmp_path))


def test_a_disk_that_is_full_at_the_merge_keeps_the_parts(tmp_path, monkeypatch):
    results = Results(tmp_path, MANIFEST, 0, 2)
    results.write(RECORD)
    monkeypatch.setattr(records.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        results.close()
    monkeypatch.undo()
    assert list(read_records(tmp_path)) == [RECORD]
    assert not list(tmp_path.glob(".results*"))
    assert Results(tmp_path, MANIFEST).close()
