"""Every form an image or a video may come in, and what is refused."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
import torch
from PIL import Image

from locateanything import media
from locateanything.media import load_image, load_video

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
PNG = io.BytesIO()
Image.fromarray(PIXELS).save(PNG, "PNG")
PNG = PNG.getvalue()
FILE = "a picture é.png"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / FILE).write_bytes(PNG)
    return tmp_path


@pytest.fixture(scope="module")
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved.png":
                self.send_response(302)
                self.send_header("Location", "/ok.png")
                self.end_headers()
                return
            if self.path == "/none.png":
                self.send_error(404)
                return
            body = b"no picture here" if self.path == "/text.png" else PNG
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + 10 * (self.path == "/short.png")))
            self.end_headers()
            if self.path == "/slow.png":
                with contextlib.suppress(OSError):  # the client hangs up
                    for byte in body[:40]:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.02)
                return
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def same(image: Image.Image, pixels: np.ndarray = PIXELS) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(
    "source",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        PIXELS.astype(np.float32) / 255,
        PIXELS.astype(np.float64) / 255,
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255).requires_grad_(),
        PNG,
        bytearray(PNG),
        {"bytes": PNG, "path": None},
        {"image": PIXELS},
        {"base64": base64.b64encode(PNG).decode()},
        {"base64": "data:image/png;base64," + base64.b64encode(PNG).decode()},
        {"image_url": {"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}},
        {"type": "image", "image": Image.fromarray(PIXELS), "url": None},
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "data:image/png;base64," + base64.encodebytes(PNG).decode().replace("=", "%3D"),
        "DATA:;BASE64," + base64.b64encode(PNG).decode(),
        "data:image/png," + quote_from_bytes(PNG),
    ],
    ids=lambda source: type(source).__name__,
)
def test_sources(source):
    assert same(load_image(source))


def test_files(folder):
    path = folder / FILE
    for source in (
        path,
        str(path),
        f"file://{path}",
        path.as_uri(),
        {"path": path},
        {"url": str(path)},
        {"type": "image", "url": path.as_uri()},
    ):
        assert same(load_image(source))


def test_urls(server):
    assert same(load_image(f"{server}/ok.png"))
    assert same(load_image(f"{server}/moved.png"))
    assert same(load_image({"type": "image", "url": f"{server}/ok.png"}))


def test_url_errors(server, monkeypatch):
    for name, message in (
        ("none.png", "answered 404"),
        ("text.png", "not an image"),
        ("short.png", "10 bytes early"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            load_image(f"{server}/{name}")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_image("http://127.0.0.1:1/x.png")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_image("http://[broken/x.png")
    monkeypatch.setattr(media, "MAX_DOWNLOAD", 20)
    with pytest.raises(ValueError, match=r"ok\.png.*larger than 20 bytes"):
        load_image(f"{server}/ok.png")


def test_slow_url_meets_the_deadline(server, monkeypatch):
    monkeypatch.setattr(media, "URL_TIMEOUT", 0.2)
    with pytest.raises(ValueError, match=r"slow\.png.*not complete within 0\.2 s"):
        load_image(f"{server}/slow.png")


def test_a_new_image_of_the_same_size_comes_back():
    image = Image.fromarray(PIXELS)
    loaded = load_image(image)
    loaded.putpixel((0, 0), (1, 2, 3))
    assert same(image)
    oriented = Image.new("RGB", (40, 20))
    oriented.getexif()[0x0112] = 6
    file = io.BytesIO()
    oriented.save(file, "JPEG", exif=oriented.getexif())
    assert load_image(file.getvalue()).size == (40, 20)  # the published processor does not turn it either


def test_transparency_is_white_in_rgba_only():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert np.asarray(load_image(image)).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    array = np.asarray(image)
    assert np.asarray(load_image(array)).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    assert load_image(Image.new("LA", (1, 1), (100, 0))).getpixel((0, 0)) == (100, 100, 100)
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 0, 0] * 256)
    palette.info["transparency"] = 0
    assert load_image(palette).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "I", "F", "PA", "RGBa", "I;16"])
def test_modes(mode):
    assert load_image(Image.new(mode, (4, 3))).mode == "RGB"


@pytest.mark.parametrize(
    ("shape", "layout", "size"),
    [
        ((5, 7), np.array, (7, 5)),
        ((5, 7, 1), np.array, (7, 5)),
        ((1, 5, 7), np.array, (7, 5)),
        ((5, 7, 4), np.array, (7, 5)),
        ((3, 9, 3), np.array, (9, 3)),
        ((3, 9, 3), torch.tensor, (3, 9)),
    ],
)
def test_array_layouts(shape, layout, size):
    assert load_image(layout(np.zeros(shape, np.uint8))).size == size


def test_half_precision():
    tensor = torch.tensor([[[0.0, 1.0]]] * 3)
    for dtype in (torch.bfloat16, torch.float16):
        assert np.asarray(load_image(tensor.to(dtype))).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "got NoneType"),
        (7, "got int"),
        ([PIXELS], "got list"),
        ({}, "got a dict"),
        ({"type": "image"}, "keys \\['type'\\]"),
        ("/no/such/picture.png", "picture.png'.*no such file"),
        ("a\0b", "no such file"),
        ("x" * 5000, "…'.*no such file"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,!!!", "not valid base64"),
        ("data:image/png,abc", "not an image"),
        (b"no picture", "10 bytes.*not an image"),
        (b"", "0 bytes"),
        (PNG[:-40], "cannot be read"),
        (np.zeros((0, 3, 3), np.uint8), "shape \\[0, 3, 3\\]"),
        (np.zeros((3, 0), np.uint8), "shape \\[3, 0\\]"),
        (np.zeros((1, 5, 5, 3), np.uint8), "shape \\[1, 5, 5, 3\\]"),
        (np.zeros((5, 7, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((5, 7, 3), np.int64), "int64"),
        (np.full((5, 7, 3), 2.0), "from 2 to 2"),
        (np.full((5, 7, 3), -0.1), "from -0.1"),
        (np.full((5, 7, 3), np.nan), "nan"),
        (torch.zeros(5, 7, 2), "1, 3 or 4 channels"),
        (Image.new("RGB", (0, 4)), "0×4"),
    ],
)
def test_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)


def test_long_data_uri_is_cut_in_the_message():
    with pytest.raises(ValueError) as error:
        load_image("data:image/png," + "a" * 100_000)
    assert len(str(error.value)) < 300


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="decompression bomb"):
        load_image(PNG)


def test_videos(folder):
    frames = load_video([PIXELS, Image.fromarray(PIXELS), folder / FILE])
    assert len(frames) == 3 and all(map(same, frames))
    stacked = np.stack([PIXELS, PIXELS])
    for video in (
        (PIXELS, PIXELS),
        stacked,
        stacked.transpose(0, 3, 1, 2),
        torch.from_numpy(stacked).permute(0, 3, 1, 2),
        torch.from_numpy(stacked).permute(0, 3, 1, 2).float(),  # 0…255, as torchvision's reader has it
        torch.from_numpy(stacked).permute(0, 3, 1, 2).float() + 0.7 * (torch.from_numpy(stacked[0, 0, 0, 0:1]) < 255),
        torch.from_numpy(stacked).permute(0, 3, 1, 2) / 255,
    ):
        frames = load_video(video)
        assert len(frames) == 2
        assert all(map(same, frames))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "at least one frame"),
        ("clip.mp4", "clip.mp4.*no video decoder"),
        ({"url": "clip.mp4"}, "no video decoder"),
        (b"mp4", "no video decoder"),
        (3, "got int"),
        ([PIXELS, None], "frame 1: image: got NoneType"),
        (np.zeros((5, 7, 3), np.uint8), "shape \\[5, 7, 3\\]"),
        (np.zeros((0, 5, 7, 3), np.uint8), "shape \\[0, 5, 7, 3\\]"),
        (np.full((1, 5, 7, 3), 300.0), "from 300"),
        (np.full((1, 5, 7, 3), -3.0), "from -3"),
    ],
)
def test_refused_videos(source, message):
    with pytest.raises(ValueError, match=message):
        load_video(source)


def test_a_data_uri_of_broken_text_is_named():
    with pytest.raises(ValueError, match=r"image 'data:image/png,.*its data are not text"):
        load_image("data:image/png,\ud800")
