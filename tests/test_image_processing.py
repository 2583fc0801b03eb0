"""Pictures in every form: what they become, bit for bit, and what is refused; the image processor; how it loads."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import struct
import threading
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from locateanything import image_processing
from locateanything.image_processing import LocateAnythingImageProcessor, load_image, load_video, shorten
from tests.conftest import CHECKPOINTS, GOLDENS, cases_of

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
FILE = "a picture é.png"
WIDE, SMALL = Image.new("RGB", (130, 90), "red"), Image.new("RGB", (20, 9), "blue")


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


PNG = file_of(Image.fromarray(PIXELS))
BASE64 = base64.b64encode(PNG).decode()


def same(image: Image.Image, pixels: np.ndarray = PIXELS) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)


# ---- sources


@pytest.mark.parametrize(
    "source",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        PIXELS.astype(np.float64) / 255,
        PIXELS.astype(np.uint16) * 257,
        PIXELS.astype(">u2") * 257,
        torch.from_numpy(PIXELS),
        (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255).requires_grad_(),
        torch.from_numpy(PIXELS.astype(np.uint16) * 257),
        PNG,
        bytearray(PNG),
        io.BytesIO(PNG),
        {"bytes": PNG, "path": "000001.png"},
        {"image": {"bytes": PNG, "path": "/nowhere/000001.png"}},
        {"base64": BASE64},
        {"base64": f"DATA:image/png;base64,{BASE64}"},
        {"image_url": {"url": f"data:image/png;base64,{BASE64}", "detail": "high"}, "type": "image_url"},
        {"type": "image", "image": Image.fromarray(PIXELS), "url": None, "text": None, "max_pixels": None},
        f"data:image/png;base64,{base64.encodebytes(PNG).decode().replace('=', '%3D')}",
        f"data:image/png,{quote_from_bytes(PNG)}",
    ],
    ids=lambda source: type(source).__name__,
)
def test_sources(source):
    for _ in range(2):  # a source can be read again
        assert same(load_image(source))


def test_files(tmp_path):
    path = tmp_path / FILE
    path.write_bytes(PNG)
    with open(path, "rb") as opened:
        for source in (path, str(path), f"file://{path}", path.as_uri(), opened, {"path": path}):
            assert same(load_image(source))
        assert not opened.closed
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "no regular file"), (".", "no regular file"), ("none.png", "no such file")):
        with pytest.raises(ValueError, match=message):
            load_image(tmp_path / name)


@pytest.fixture(scope="module")
def server():
    """Pictures under several names; `asked` holds the paths and the logins that came."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            running.asked.append((self.path, self.headers.get("Authorization")))
            name = self.path.partition("?")[0]
            if name.startswith("/moved"):
                self.send_response(302)
                where = {"/moved.png": "/ok.png", "/moved-file.png": "file:///etc/passwd?token=SECRET"}
                self.send_header("Location", where.get(name, "http://user:SECRET@127.0.0.1:1/x.png?token=SECRET"))
                self.end_headers()
                return
            self.send_response(404 if name == "/none.png" else 200, "SECRET")
            self.end_headers()
            self.wfile.write(b"no picture here" if name == "/text.png" else PNG)

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.asked = []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def test_urls_are_quoted_as_browsers_do(server):
    at = f"http://127.0.0.1:{server.server_port}"
    for path, asked in {
        "/ok.png": "/ok.png",
        "/a b.png": "/a%20b.png",
        "/a%20b.png?x=1&y=%C3%A9": "/a%20b.png?x=1&y=%C3%A9",
        "/é/100%.png?q=ü v#part": "/%C3%A9/100%.png?q=%C3%BC%20v",
        "/moved.png": "/ok.png",
    }.items():
        server.asked.clear()
        assert same(load_image({"type": "image", "url": f" {at.replace('http', 'HTTP')}{path} "}))
        assert server.asked[-1] == (asked, None)
    with pytest.raises(ValueError, match="no download") as caught:
        load_image("http://bücher.invalid/x.png")
    assert "UnicodeEncodeError" not in str(caught.value), "such a host is asked for by its IDNA name"


def test_a_login_in_a_url_is_used_and_never_told(server, recwarn):
    at = f"127.0.0.1:{server.server_port}"
    assert same(load_image(f"http://us%40er:SECRET@{at}/ok.png?token=SECRET"))
    login = base64.b64encode(b"us@er:SECRET").decode()
    assert server.asked[-1] == ("/ok.png?token=SECRET", f"Basic {login}")
    assert same(load_image(f"http://user:SECRET@{at}/moved.png"))
    assert server.asked[-1] == ("/ok.png", None), "where a redirection leads, the login does not follow"
    for url in (
        f"http://user:SECRET@{at}/none.png?X-Amz-Signature=SECRET",
        f"http://user:SECRET@{at}/text.png?sig=SECRET#SECRET",
        f"http://user:SECRET@{at}/moved-file.png",
        f"http://user:SECRET@{at}/moved-login.png",
        f"http://user:SECRET@{at}/none.png?SECRET\x00",
        "http://user:SECRET@127.0.0.1:1/x.png?token=SECRET",
        "http://user:SE?CRET@[broken/x.png",
        "http://user:SECRET@host:port/x.png",
        "s3://user:SECRET@bucket/x.png?token=SECRET",
        "  https://user:SECRET@" + "x" * 300 + "/x.png",
    ):
        for load in (load_image, load_video):
            with pytest.raises(ValueError, match="image ") as caught:
                load(url)
            error: BaseException | None = caught.value
            while error is not None:
                assert "SECRET" not in str(error) and "CRET" not in str(error)
                error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert shorten("https://u:p@host:8/a/b.png?key=1#2") == "'https://host:8/a/b.png'"
    assert shorten("dir/a@b?c#d.png") == "'dir/a@b?c#d.png'"


def test_downloads_have_a_limit(server, monkeypatch):
    monkeypatch.setattr(image_processing, "MAX_DOWNLOAD", 20)
    with pytest.raises(ValueError, match=r"ok\.png.*larger than 20 bytes"):
        load_image(f"http://127.0.0.1:{server.server_port}/ok.png")


def test_a_new_image_comes_back(tmp_path):
    image, mapped = Image.fromarray(PIXELS), tmp_path / "mapped.bmp"
    image.save(mapped)
    for source in (image, PIXELS, torch.from_numpy(PIXELS), mapped):
        loaded = load_image(source)
        loaded.putpixel((0, 0), (1, 2, 3))
        assert same(load_image(source))
    loaded = load_image(mapped)
    Image.new("RGB", (7, 5)).save(mapped)
    assert same(loaded)


def test_an_image_that_is_only_read_is_not_copied():
    image = Image.fromarray(PIXELS).copy()
    assert load_image(image, copy=False) is image and load_image({"image": image}, copy=False) is image
    assert load_video([image], copy=False)[0] is image and load_video([image])[0] is not image
    assert load_image(image.convert("RGBA"), copy=False).mode == "RGB"
    before = image.tobytes()
    LocateAnythingImageProcessor()([image, image])
    assert image.tobytes() == before


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (1, 5, 7), (5, 7, 4), (4, 5, 7)])
def test_array_layouts(shape):
    pixels = np.zeros(shape, np.uint8)
    assert load_image(pixels).size == load_image(torch.from_numpy(pixels)).size == (7, 5)
    both = np.zeros((3, 9, 3), np.uint8)
    assert load_image(both).size == (9, 3) and load_image(torch.from_numpy(both)).size == (3, 9)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "got NoneType"),
        ([PIXELS], "got list"),
        ({"type": "image"}, "'type'"),
        ({"image": {"url": "x.png", "crop": [1, 2, 3, 4]}}, r"\['crop'\]"),
        ("a\0b", "no such file"),
        ("x" * 5000, "…'.*no such file"),
        ("data:image/png;base64", "cannot be read"),
        ("data:image/png,\ud800", "cannot be read"),
        ({"base64": "!!!"}, "not an image"),
        ("data:image/png," + "a" * 9999, "…'.*not an image"),
        (b"", "0 bytes"),
        (PNG[:-40], "cannot be read"),
        (io.StringIO("text"), "StringIO"),
        (np.zeros((0, 3, 3), np.uint8), r"shape \[0, 3, 3\]"),
        (np.zeros((1, 5, 5, 3), np.uint8), r"shape \[1, 5, 5, 3\]"),
        (np.zeros((5, 7, 2), np.uint8), "1, 3 or 4 channels"),
        (np.full((5, 7, 3), 2.0), "from 2 to 2"),
        (np.full((5, 7, 3), np.nan), "nan"),
        *((np.zeros((5, 7, 3), dtype), dtype) for dtype in ("int16", "uint32", "int64", "bool", "complex64")),
        (torch.zeros(2, 2, device="meta"), "Tensor"),
        (Image.new("RGB", (0, 4)), "0×4"),
        *((Image.new(mode, (4, 3)), f"mode {mode} has no range") for mode in "IF"),
        *((file_of(Image.new(mode, (4, 3)), "TIFF"), f"mode {mode}") for mode in "IF"),
    ],
)
def test_refused(source, message):
    with pytest.raises(ValueError, match=f"^image.*{message}") as caught:
        load_image(source)
    assert len(str(caught.value)) < 500


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (png(100_000, 100_000, (b"IDAT", zlib.compress(bytes(1000)))), "decompression bomb"),
        (png(8, 8, (b"zTXt", b"x\0\0" + zlib.compress(bytes(2**27))), (b"IDAT", b"")), "cannot be read"),
        (png(8, 8, (b"iCCP", b"x\0\0" + zlib.compress(bytes(2**27))), (b"IDAT", b"")), "cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "PostScript"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
)
def test_bombs_are_refused(bomb, message):
    with pytest.raises(ValueError, match=rf"image {len(bomb)} bytes: .*{message}"):
        load_image(bomb)


def bounded(examples: int):
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


KEYS = st.sampled_from([*image_processing.SOURCE_KEYS, *image_processing.SIZE_KEYS, "x"])
SOURCES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(),
        st.text(st.characters(codec=None)).map("data:".__add__),
        st.text(st.characters(codec=None)).map("data:image/png;base64,".__add__),
        st.text(st.characters(codec=None)).map("file://".__add__),
        st.just(torch.zeros(2, 2, device="meta")), st.just(torch.eye(3).to_sparse()),
        st.just(np.array([[None]])), st.just(np.array([["a"]])), st.just(np.float32(3)),
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8))
ENCODED = [file_of(NOISE, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO")]


@bounded(200)
@given(SOURCES)
def test_any_source_is_read_or_refused(source):
    for load in (load_image, load_video):
        try:
            load(source)
        except ValueError as error:
            assert str(error)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")  # of damaged files
@bounded(150)
@given(st.sampled_from(ENCODED), st.data(), st.booleans())
def test_damaged_files_are_read_or_refused_by_name(file, data, upright):
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(file)), st.integers(0, len(file)))))
    damaged = data.draw(st.sampled_from([file[:start], file[:start] + data.draw(st.binary(max_size=8)) + file[stop:]]))
    try:
        assert load_image(damaged, upright=upright).mode == "RGB"
    except ValueError as error:
        assert str(error).startswith(f"image {len(damaged)} bytes: ")


# ---- modes


def palette(transparency=None) -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 1, 2, 3, 9, 9, 9])
    image.putdata([0, 1, 2])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


# The values of a 3×1 picture, and what the published processor's conversion makes of them.
MODES = [
    ("1", [0, 255, 255], [(0, 0, 0), (255, 255, 255), (255, 255, 255)]),
    ("L", [0, 100, 255], [(0, 0, 0), (100, 100, 100), (255, 255, 255)]),
    ("LA", [(0, 0), (100, 7), (255, 255)], [(0, 0, 0), (100, 100, 100), (255, 255, 255)]),
    ("RGB", [(1, 2, 3), (0, 0, 0), (255, 254, 253)], [(1, 2, 3), (0, 0, 0), (255, 254, 253)]),
    ("RGBA", [(255, 0, 0, 0), (255, 0, 0, 255), (0, 0, 200, 100)], [(255, 255, 255), (255, 0, 0), (155, 155, 233)]),
    ("RGBa", [(0, 0, 0, 0), (99, 0, 0, 255), (50, 20, 10, 100)], [(0, 0, 0), (99, 0, 0), (127, 51, 25)]),
    ("RGBX", [(1, 2, 3, 0), (0, 0, 0, 9), (255, 254, 253, 255)], [(1, 2, 3), (0, 0, 0), (255, 254, 253)]),
    ("CMYK", [(0, 0, 0, 0), (255, 0, 0, 0), (10, 20, 30, 40)], [(255, 255, 255), (0, 255, 255), (207, 198, 190)]),
    ("YCbCr", [(0, 128, 128), (76, 85, 255), (200, 100, 90)], [(0, 0, 0), (254, 0, 0), (146, 236, 150)]),
    ("HSV", [(0, 0, 0), (0, 255, 255), (85, 200, 100)], [(0, 0, 0), (255, 0, 0), (22, 100, 22)]),
    ("LAB", [(0, 128, 128), (255, 128, 128), (138, 190, 60)], [(1, 0, 1), (254, 255, 254), (182, 81, 250)]),
    ("P", palette(), [(255, 0, 0), (1, 2, 3), (9, 9, 9)]),
    ("P", palette(0), [(255, 0, 0), (1, 2, 3), (9, 9, 9)]),
    ("P", palette(b"\x00\x80"), [(255, 0, 0), (1, 2, 3), (9, 9, 9)]),
    ("I;16", [0, 32767, 65535], [(0, 0, 0), (127, 127, 127), (255, 255, 255)]),
    ("I;16B", [255, 256, 65280], [(0, 0, 0), (1, 1, 1), (255, 255, 255)]),
    ("I;16L", [255, 256, 65280], [(0, 0, 0), (1, 1, 1), (255, 255, 255)]),
]


@pytest.mark.filterwarnings("ignore:Palette images")  # PIL's advice
@pytest.mark.parametrize(("mode", "values", "expected"), MODES, ids=map(str, range(len(MODES))))
def test_modes(mode, values, expected):
    if isinstance(values, Image.Image):
        image = values
    elif mode.startswith("I;16"):
        image = Image.frombytes(mode, (3, 1), np.array(values, ">u2" if mode == "I;16B" else "<u2").tobytes())
    else:
        image = Image.new(mode, (3, 1))
        for x, value in enumerate(values):
            image.putpixel((x, 0), value)
    loaded = load_image(image)
    assert [loaded.getpixel((x, 0)) for x in range(3)] == expected


def test_sixteen_bits_are_scaled_in_files_and_arrays():
    """In greys as PIL does it in colours: black, middle and white stay what they are."""
    values = np.array([[0, 255, 256, 300, 9999], [32768, 65279, 65280, 65534, 65535]], np.uint16)
    grey = (values >> 8).astype(np.uint8)
    expected = np.stack([grey] * 3, 2)
    image = Image.fromarray(values)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.stack([values] * 3, 2))
    coloured = png(5, 2, (b"IDAT", zlib.compress(rows)), depth=16)
    pgm = b"P5 5 2 65535\n" + values.astype(">u2").tobytes()
    for source in (image, file_of(image), file_of(image, "TIFF"), coloured, pgm, values, torch.from_numpy(values)):
        assert same(load_image(source), expected)
    assert same(load_image(np.stack([values] * 3)), expected)
    assert same(load_video(np.stack([values] * 6).reshape(2, 3, 2, 5))[1], expected)
    opaque = np.full((2, 5, 4), 65535, np.uint16)
    opaque[..., :3] = values[..., None]
    assert same(load_image(opaque), expected)


# ---- EXIF, frames, sizes


def turned(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    left_red = Image.new("RGB", (64, 32), "blue")
    left_red.paste("red", (0, 0, 16, 32))
    return file_of(left_red, kind, exif=exif)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_upright(kind):
    for orientation, size, red in (
        (1, (64, 32), (4, 16)), (3, (64, 32), (60, 16)), (6, (32, 64), (16, 4)), (8, (32, 64), (16, 60)),
    ):  # fmt: skip
        file = turned(orientation, kind)
        stored = load_image(file)
        assert stored.size == (64, 32) and stored.getpixel((4, 16))[0] > 200, "as the published processor has it"
        for source in (file, Image.open(io.BytesIO(file)), {"image": file}):
            upright = load_image(source, upright=True)
            assert upright.size == size and upright.getpixel(red)[0] > 200
            for again in (upright, file_of(upright, "JPEG", exif=upright.getexif()), file_of(upright)):
                assert load_image(again, upright=True).size == size, "turned once, whatever is written"
        assert load_video([file], upright=True)[0].size == size
        grid = LocateAnythingImageProcessor(upright=True)(file)["image_grid_hws"]
        assert grid.tolist() == [[-(-size[1] // 28) * 2, -(-size[0] // 28) * 2]]
    assert LocateAnythingImageProcessor()(file)["image_grid_hws"].tolist() == [[4, 6]]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_orientation_turns_nothing():
    image = Image.new("RGB", (40, 20))
    for exif in (b"Exif\0\0broken", b"Exif\0\0II*\0\xff\xff\xff\xff", turned(6, "JPEG")[:30]):
        assert load_image(file_of(image, "JPEG", exif=exif), upright=True).size == (40, 20)


COLOURS = ["red", "lime", "blue"]


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (40, 30), colour) for colour in COLOURS]
    options = {"lossless": True} if kind == "WEBP" else {}
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames(kind, tmp_path):
    file = animation(kind)
    path = tmp_path / "several"
    path.write_bytes(file)
    opened = Image.open(path)
    expected = [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in COLOURS]
    for source in (file, path, str(path), io.BytesIO(file), opened, {"bytes": file, "path": None}):
        with pytest.warns(UserWarning, match="several frames") as caught:
            loaded = load_image(source)
        assert len(caught) == 1
        assert loaded.size == (40, 30) and loaded.getpixel((5, 5)) == expected[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_image(loaded)
            frames = load_video(source)
        assert [frame.getpixel((5, 5)) for frame in frames] == expected
    opened.seek(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(opened).getpixel((5, 5)) == expected[2], "a frame that the caller chose"
        assert len(load_video(opened)) == 3 and opened.tell() == 2
        for single in (file_of(Image.new("RGB", (4, 3)), kind), Image.new("RGB", (4, 3))):
            load_image(single)
            assert len(load_video(single)) == 1


def test_a_cameras_previews_are_no_frames():
    photo = Image.new("RGB", (40, 30), "red")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(file_of(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 6))]))


@pytest.mark.parametrize(
    ("size", "keys", "expected"),
    [
        ((1000, 1000), {"max_pixels": 1_000_000}, (980, 980)),  # as it is, preprocessing would make 1008×1008
        ((1000, 500), {"max_pixels": 1_000_000, "min_pixels": 56 * 56}, (1000, 500)),
        ((1000, 500), {"max_pixels": 100 * 28 * 28}, (392, 196)),
        ((2800, 28), {"max_pixels": 10 * 28 * 28}, (280, 28)),
        ((28, 2800), {"max_pixels": 10 * 28 * 28}, (28, 280)),
        ((500, 500), {"max_pixels": 3}, (28, 28)),
        ((30, 60), {"min_pixels": 100 * 28 * 28}, (224, 420)),
        ((30, 60), {"resized_height": 100, "resized_width": 200}, (196, 112)),
        ((30, 60), {"resized_height": 1, "resized_width": 42, "max_pixels": 784}, (56, 28)),
    ],
)
def test_sizes_of_items(size, keys, expected):
    """(width, height) before and after; keys, Qwen's, are in pixels."""
    image = Image.new("RGB", size)
    for item in ({"image": image, **keys}, {"type": "image", "image": {"image": image}, **keys}):
        assert load_image(item).size == expected
        if expected != size:
            grid = LocateAnythingImageProcessor()(item)["image_grid_hws"].tolist()
            assert grid == [[expected[1] // 14, expected[0] // 14]]
    assert [frame.size for frame in load_video({"image": [image] * 2, **keys})] == [expected] * 2


@bounded(200)
@given(st.tuples(st.integers(1, 1500), st.integers(1, 1500)), st.integers(784, 10**6), st.integers(1, 10**6))
def test_a_budget_is_kept(size, most, least):
    """By what preprocessing makes of the result, which is the next multiple of 28 a side."""
    shrunk = load_image({"image": Image.new("RGB", size), "max_pixels": most})
    grown = load_image({"image": Image.new("RGB", size), "min_pixels": least})
    pixels = [-(-image.width // 28) * -(-image.height // 28) * 28**2 for image in (shrunk, grown)]
    assert pixels[0] <= most and pixels[1] >= least


@pytest.mark.parametrize("key", image_processing.SIZE_KEYS)
@pytest.mark.parametrize("value", [0, 1.5, "9", True])
def test_refused_sizes(key, value):
    with pytest.raises(ValueError, match=f"{key}: got {value!r}"):
        load_image({"image": WIDE, key: value})
    if key.startswith("resized"):
        with pytest.raises(ValueError, match=r"resized_height, resized_width: .*both"):
            load_image({"image": WIDE, key: 100})


# ---- videos


def test_videos():
    stacked = np.stack([PIXELS, PIXELS])
    tensor = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    floats = tensor.float()  # 0…255, as torchvision's reader has it
    for video in ([PIXELS, Image.fromarray(PIXELS)], (PNG, {"bytes": PNG}), stacked, stacked.transpose(0, 3, 1, 2),
                  tensor, floats, floats + 0.7 * (tensor < 255), tensor / 255):  # fmt: skip
        frames = load_video(video)
        assert len(frames) == 2 and all(map(same, frames))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "at least one"),
        ({"url": "clip.mp4"}, "clip.mp4.*no video decoder"),
        (b"mp4", "no video decoder"),
        (3, "got int"),
        ([PIXELS, None], r"\[1\]: image.*NoneType"),
        *((np.zeros(shape, np.uint8), "shape") for shape in [(5, 7, 3), (0, 5, 7, 3)]),
        (np.full((1, 5, 7, 3), 300.0), "from 300"),
        (np.full((1, 5, 7, 3), -3.0), "from -3"),
    ],
)
def test_refused_videos(source, message):
    with pytest.raises(ValueError, match=f"^video.*{message}"):
        load_video(source)


# ---- image processor


def test_pixels_are_bit_equal(golden):
    first = {case["case"]: case for case in reversed(cases_of(golden))}
    processor = LocateAnythingImageProcessor.from_pretrained(CHECKPOINTS[golden])
    for index in range(3):
        expected = load_file(GOLDENS / golden / f"tensors_{index:03d}.safetensors")["pixel_values"]
        path = GOLDENS / golden / "images" / first[index]["images"][0]
        for source in (path, Image.open(path), np.asarray(Image.open(path))):
            inputs = processor(source, return_tensors="pt")
            assert torch.equal(inputs["pixel_values"], expected)
            assert inputs["image_grid_hws"].tolist() == first[index]["image_grid_hws"]


@pytest.mark.parametrize("limit", [25600, 16])
def test_patches_are_the_published_arithmetic(limit):
    """Over the limit in two resizes; divided, subtracted, divided in this order, in float32."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = np.random.default_rng(3).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    processor = LocateAnythingImageProcessor(in_token_limit=limit, image_mean=mean, image_std=std)
    if limit == 16:
        scale = (16 / (90 // 14 * (70 // 14))) ** 0.5
        image = image.resize((int(90 * scale), int(70 * scale)), Image.Resampling.BICUBIC)
    width, height = (-(-side // 28) * 28 for side in image.size)
    values = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    values = (values.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    out = processor(Image.fromarray(pixels))
    rows, columns = out["image_grid_hws"][0].tolist()
    assert (rows, columns) == (height // 14, width // 14)
    for index, patch in enumerate(out["pixel_values"]):
        top, left = index // columns * 14, index % columns * 14
        assert torch.equal(patch, values[:, top : top + 14, left : left + 14])


@pytest.mark.parametrize(
    ("size", "grid"),
    [((1, 1), (2, 2)), ((28, 28), (2, 2)), ((29, 28), (2, 4)), ((13, 500), (36, 2)), ((7140, 28), (2, 510)),
     ((2254, 2254), (160, 160)), ((2300, 2300), (162, 162)), ((3000, 4000), (186, 140)), ((5000, 4000), (144, 180))],
)  # fmt: skip
def test_grids(size, grid):
    """(width, height) in pixels to (rows, columns), as recorded from the published processor."""
    processor = LocateAnythingImageProcessor()
    width, height = size
    assert processor.grid_of(height, width) == grid
    assert processor.get_number_of_image_patches(height, width) == grid[0] * grid[1]
    assert processor.get_number_of_image_tokens(height, width) == grid[0] * grid[1] // 4


@bounded(300)
@given(height=st.integers(1, 300_000), width=st.integers(1, 300_000), limit=st.integers(1, 60_000))
def test_a_grid_is_within_limits_or_refused(height, width, limit):
    processor = LocateAnythingImageProcessor(in_token_limit=limit)
    try:
        rows, columns = processor.grid_of(height, width)
    except ValueError as error:
        assert str(width) in str(error) and str(height) in str(error)
        return
    assert 0 < rows < 512 and 0 < columns < 512 and rows % 2 == columns % 2 == 0
    # the limit counts whole patches; a thin picture has nearly one more on each side, and padding adds a merge
    assert (rows - 2) * (columns - 2) <= 4 * limit


def test_equal_pictures_are_computed_once(monkeypatch):
    """By what they show, not by object; each as if it were alone."""
    processor = LocateAnythingImageProcessor()
    other = WIDE.copy()
    other.putpixel((3, 3), (0, 0, 0))
    images = [WIDE, WIDE.copy(), other, WIDE.rotate(90, expand=True), SMALL, np.asarray(WIDE)]
    alone = [processor(image) for image in images]
    resized = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *rest: resized.append(self) or resize(self, *rest))
    for pictures, tensors in ((images, "pt"), (tuple(images), "np"), (images, None)):
        out = processor(pictures, return_tensors=tensors)
        for name in ("pixel_values", "image_grid_hws"):
            assert isinstance(out[name], np.ndarray) == (tensors == "np")
            together, expected = torch.as_tensor(out[name]), torch.cat([one[name] for one in alone])
            assert together.dtype == expected.dtype and torch.equal(together, expected)
    assert len(resized) == 3 * 4
    assert out["image_grid_hws"].tolist() == [[8, 10], [8, 10], [8, 10], [10, 8], [2, 2], [8, 10]]
    assert out["pixel_values"].shape == (404, 3, 14, 14) and out["pixel_values"].dtype == torch.float32
    assert processor(np.zeros((3, 28, 28, 3), np.uint8))["image_grid_hws"].tolist() == [[2, 2]] * 3


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images: got an empty list"),
        ([WIDE, Image.new("RGB", (7141, 28))], r"images\[1\]: 7141×28 pixels make 512×2 patches"),
        ([WIDE, Image.new("RGB", (0, 3))], r"images\[1\]: .*side of zero"),
        ([WIDE, SMALL, "no/such.png"], r"images\[2\]: .*no such file"),
        ([[WIDE]], r"images\[0\]: .*got list"),
    ],
)
def test_image_processor_errors(images, message):
    with pytest.raises(ValueError, match=message):
        LocateAnythingImageProcessor().preprocess(images)


# ---- loading


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """Of a checkpoint whose files name an image_processor_type, as the published one's do."""
    from hub.assembly import assemble

    folder = tmp_path_factory.mktemp("assembled") / "model"
    assemble(CHECKPOINTS["shapes-early"], folder)
    return folder


@pytest.mark.parametrize("use_fast", [None, True, False])
def test_no_fast_class_is_looked_for_where_there_is_torchvision(assembled, monkeypatch, use_fast):
    """The official evaluation passes use_fast=True."""
    monkeypatch.setattr(transformers.models.auto.image_processing_auto, "is_torchvision_available", lambda: True)
    keywords = {} if use_fast is None else {"use_fast": use_fast}
    for name in ("AutoImageProcessor", "AutoProcessor"):
        loaded = getattr(transformers, name).from_pretrained(assembled, trust_remote_code=True, **keywords)
        assert type(loaded).__name__ == f"LocateAnything{name.removeprefix('Auto')}"


def test_settings_may_be_given_on_loading_and_are_saved(assembled, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    keywords = {"trust_remote_code": True, "upright": True, "in_token_limit": 64}
    loaded = transformers.AutoImageProcessor.from_pretrained(assembled, **keywords)
    loaded.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (saved["upright"], saved["in_token_limit"]) == (True, 64)
    assert "image_processor_type" not in saved, "by which transformers 4.57 would look for a fast class first"
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.to_dict() == loaded.to_dict() and caplog.messages == []
