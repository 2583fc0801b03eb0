"""scan/sources.py: every kind of source, in natural order, lazily, with an error where a picture cannot be had."""

import base64
import csv
import io
import json
import os
import struct
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from scan import sources
from scan.records import MANIFEST, Results
from scan.sources import estimate, name_of, read_items, read_list

SETTINGS = {"model": "m", "revision": None, "sources": [], "settings": {}}


def encoded(colour="red", size=(8, 6), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(colour))
    return str(path)


def video(path, frames=12, fps=6, size=(64, 48), rotated=False):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), min(20 * number, 255), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


def colours(items):
    return [item.load().getpixel((0, 0)) for item in items]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Pictures whose names sort otherwise by letters, among what is none, and the folder of an earlier scan."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "p/f10.png",
        "p/f2.PNG",
        "p/b/1.jpg",
        "p/.hidden.png",
        "p/._f2.png",
        "p/.d/x.png",
        "p/found/drawn.png",
    ):
        picture(tmp_path / name)
    (tmp_path / "p" / "notes.txt").write_text("no picture")
    Results(tmp_path / "p" / "found2", SETTINGS).close()
    for name in (MANIFEST, "results.jsonl"):
        (tmp_path / "p" / "found" / name).write_bytes((tmp_path / "p" / "found2" / name).read_bytes())
    return tmp_path


def test_folders_and_globs_come_in_natural_order(tree):
    everything = ["p/b/1.jpg", "p/f2.PNG", "p/f10.png"]
    assert [item.source for item in read_items(["p"])] == everything
    assert [item.source for item in read_items(["p/**/f*[0-9].png", "p/f2.PNG"])] == ["p/f10.png", "p/f2.PNG"]
    assert [item.source for item in read_items(["p/f?.PNG"])] == ["p/f2.PNG"]
    assert estimate(["p", "p/f*", "p/b/1.jpg"]) == 6
    (nothing,) = read_items(["p/*.webp"])
    with pytest.raises(ValueError, match=r"p/\*\.webp"):
        nothing.load()


def test_globs_find_lists_too_and_addresses_are_none(tree):
    for name in ("f10.png", "f2.PNG"):
        (tree / f"{name}.jsonl").write_text(f'{{"image": "p/{name}", "query": "x"}}\n')
    assert [item.source for item in read_items(["*.jsonl"])] == ["p/f2.PNG", "p/f10.png"]
    assert estimate(["*.jsonl"]) == 2
    assert estimate(["https://host/a.jpg?size=1", "https://host/list.csv"]) == 2


def test_a_file_that_is_named_like_a_glob_is_itself(tree):
    picture(tree / "a[1].png")
    picture(tree / "a1.png")
    assert [item.source for item in read_items(["a[1].png"])] == ["a[1].png"]


def test_lists_of_paths(tree, monkeypatch):
    (tree / "list.txt").write_bytes(b"p/f10.png\r\n\np/b\n")
    assert [item.source for item in read_items(read_list("list.txt"))] == ["p/f10.png", "p/b/1.jpg"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"p/f10.png\np/b")))
    assert [item.source for item in read_items(["-"])] == ["p/f10.png", "p/b/1.jpg"]


def test_names_that_are_no_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    picture(tmp_path / name)
    (tmp_path / "list").write_bytes(os.fsencode(tmp_path / name) + b"\n")
    (tmp_path / "list.csv").write_bytes(b"image\n" + os.fsencode(tmp_path / name))
    (walked,), (listed,) = read_items([str(tmp_path)]), read_items(read_list(str(tmp_path / "list")))
    assert [walked] == [listed] == list(read_items([str(tmp_path / "list.csv")]))
    assert walked.source == str(tmp_path / name)
    assert walked.load().size == (8, 6)


def test_urls_and_data_uris_have_names_of_their_own_without_secrets():
    urls = [f"https://user:SECRET@host/x.png{rest}" for rest in ("?token=SECRET", "?token=OTHER", "")]
    data = [f"data:image/png;base64,{base64.b64encode(encoded(colour)).decode()}" for colour in ("red", "blue")]
    items = list(read_items([*urls, *data, "https://host/x.png"]))
    names = [item.source for item in items]
    assert len(set(names)) == len(names)
    assert not any("SECRET" in name or len(name) > 60 for name in names)
    assert names[0].startswith("https://host/x.png#") and names[-1] == "https://host/x.png"
    assert colours(items[3:5]) == [(255, 0, 0), (0, 0, 255)]
    assert name_of(urls[0]) == names[0]


def test_jsonl_of_the_official_batches_and_of_vllms(tree):
    body = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": []}]}
    body["messages"][1]["content"] = [
        {"type": "image_url", "image_url": {"url": "p/b/1.jpg"}},
        {"type": "text", "text": "Q"},
    ]
    lines = [
        {"image": "b/1.jpg", "query": "person</c> car</c>person"},  # beside the list
        {"image_path": str(tree / "p" / "f2.PNG"), "id": 7},
        {"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"query": "no picture"},
        {"image": "b/1.jpg", "query": [1]},
        {"custom_id": "2", "body": {"messages": [{"role": "user", "content": "no picture"}]}},
        {"custom_id": "3", "body": {}},
        [],
    ]
    (tree / "p" / "list.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\nno json\n" + json.dumps(lines[0]))
    items = list(read_items(["p/list.jsonl"]))
    assert (items[0].source, items[0].queries, items[0].prompt) == ("p/b/1.jpg", ("person", "car"), None)
    assert (items[1].source, items[1].queries, items[1].id) == (str(tree / "p" / "f2.PNG"), None, "7")
    assert (items[2].source, items[2].prompt, items[2].id) == ("p/b/1.jpg", "Q", "request-1")
    assert colours(items[:3]) == colours(read_items(["p"])) or len(items) == 10
    for number, item in enumerate(items[3:9], 4):
        assert item.source == f"p/list.jsonl:{number}"
        with pytest.raises(ValueError, match=f"line {number}"):
            item.load()
    assert items[9] == items[0]
    assert estimate(["p/list.jsonl"]) == 11


def test_csv(tree):
    with open("list.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["image", "query"], ["p/f2.PNG", "é</c>car"], ["p/b/1.jpg", ""], ["", "x"]])
    first, second, third = read_items(["list.csv"])
    assert (first.source, first.queries) == ("p/f2.PNG", ("é", "car"))
    assert (second.source, second.queries) == ("p/b/1.jpg", None)
    with pytest.raises(ValueError, match="line 3"):
        third.load()
    assert estimate(["list.csv"]) == 3


def test_parquet_with_bytes_and_paths(tree):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    hidden = [{"bytes": encoded("blue"), "path": "nowhere.png"}, {"bytes": None, "path": "p/f2.PNG"}]
    parquet.write_table(arrow.table({"image": hidden, "query": ["a</c>b", None], "much": ["x", "y"]}), "d.parquet")
    parquet.write_table(arrow.table({"image": [encoded("lime")], "queries": [["a", "b"]]}), "raw.parquet")
    (tree / "broken.parquet").write_bytes(b"PAR1")
    items = list(read_items(["d.parquet", "raw.parquet"]))
    assert [item.source for item in items] == ["d.parquet:1", "p/f2.PNG", "raw.parquet:1"]
    assert [item.queries for item in items] == [("a", "b"), None, ("a", "b")]
    assert colours(items) == [(0, 0, 255), (255, 0, 0), (0, 255, 0)]
    assert estimate(["d.parquet", "raw.parquet"]) == 3
    (broken,) = read_items(["broken.parquet"])
    with pytest.raises(ValueError, match=r"broken\.parquet"):
        broken.load()


def test_frames_of_videos(tmp_path):
    path = video(tmp_path / "v.mp4")
    frames = list(read_items([path]))
    assert [item.frame for item in frames] == list(range(12))
    assert [item.time for item in frames] == pytest.approx([number / 6 for number in range(12)], abs=1e-5)
    assert {item.source for item in frames} == {path} and frames[0].load().size == (64, 48)
    shades = [red for red, _, _ in colours(frames)]
    assert shades == sorted(shades) and shades[-1] > 200
    for options, expected in (
        ({"fps": 2}, [0, 3, 6, 9]),
        ({"fps": 4}, [0, 2, 3, 5, 6, 8, 9, 11]),
        ({"fps": 60}, list(range(12))),
        ({"every": 5}, [0, 5, 10]),
    ):
        assert [item.frame for item in read_items([path], **options)] == expected
        assert abs(estimate([path], **options) - len(expected)) <= (108 if options == {"fps": 60} else 1)


def test_videos_that_break_or_are_none(tmp_path):
    whole = video(tmp_path / "v.mp4", frames=60)
    broken = tmp_path / "cut.mp4"
    broken.write_bytes(b"not a video at all")
    items = list(read_items([str(broken), str(tmp_path / "absent.mkv"), whole]))
    assert len(items) == 62
    for item in items[:2]:
        with pytest.raises(ValueError, match=r"cut\.mp4|absent\.mkv"):
            item.load()


def test_frames_of_telephones_are_upright(tmp_path):
    """A quarter turn to the right in the file's header: what lies at the left is shown at the top."""
    path = tmp_path / "v.mp4"
    video(path, frames=1)
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    content = path.read_bytes()
    at = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:at] + turned + content[at + len(turned) :])
    (item,) = read_items([str(path)])
    plain, shown = np.asarray(item.image.to_image()), np.asarray(item.load())
    assert plain.shape == (48, 64, 3) and shown.shape == (64, 48, 3)
    assert (shown == plain[::-1].swapaxes(0, 1)).all()


def test_folders_named_like_videos_and_folders_that_are_closed(tree, monkeypatch):
    picture(tree / "clip.mp4" / "1.png")
    assert [item.source for item in read_items(["clip.mp4"])] == ["clip.mp4/1.png"]
    scandir = os.scandir

    def closed(path):
        if path == "p/b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    first, *others = read_items(["p"])
    assert [item.source for item in others] == ["p/f2.PNG", "p/f10.png"]
    with pytest.raises(ValueError, match="Permission denied: 'p/b'"):
        first.load()


def test_a_missing_library_is_told_per_file(tree, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    for name, package in (("v.mp4", "av"), ("d.parquet", "pyarrow")):
        first, second = read_items([name, "p/f2.PNG"])
        with pytest.raises(ValueError, match=f"pip install {package}"):
            first.load()
        assert second.load().size == (8, 6)


def test_turned_photos_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.jpg", exif=exif)
    (item,) = read_items([str(tmp_path / "turned.jpg")])
    assert item.load().size == (6, 8)


def test_many_paths_and_long_videos_take_no_memory(tmp_path, monkeypatch):
    (tmp_path / "list").write_text("".join(f"frames/{number:06}.png\n" for number in range(20_000)))
    tracemalloc.start()
    assert sum(1 for _ in read_items(read_list(str(tmp_path / "list")))) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    # a video of which three frames are wanted is not decoded to its end
    path, decoded = video(tmp_path / "v.mp4", frames=200), []
    natural = sources.Item.__init__
    monkeypatch.setattr(sources.Item, "__init__", lambda *a, **k: (decoded.append(1), natural(*a, **k))[1])
    assert len(list(islice(read_items([path]), 3))) == 3
    assert len(decoded) == 3
