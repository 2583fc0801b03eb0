"""Drawn pictures: what is on them, where, and in which letters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from scan import drawing
from scan.drawing import draw
from scan.records import Detection

GREY = Image.new("RGB", (640, 480), (128, 128, 128))
LONG = "the person in the very long red coat who stands at the far left side of the street " * 3


def box(label, *at, score=0.9):
    return Detection(label, 0, tuple(map(float, at)), None, score, None)


def point(label, *at, score=None):
    return Detection(label, 0, None, tuple(map(float, at)), score, None)


@pytest.fixture
def written(monkeypatch):
    """The texts that are written, with the rectangle that each covers."""
    texts = []
    text = ImageDraw.ImageDraw.text

    def spy(self, at, words, fill, font, anchor):
        texts.append((words, self.textbbox(at, words, font, anchor)))
        return text(self, at, words, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    return texts


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("size", [(640, 480), (112, 84), (48, 32), (1, 1), (3000, 20)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_picture_keeps_its_size(size, mode):
    image = Image.new(mode, size)
    before = image.tobytes()
    drawn = draw(image, [box("red circle", 0, 0, size[0] / 2, size[1]), point("é", *size), box(LONG, 0, 0, *size)], {})
    assert drawn.size == size and drawn.mode == "RGB" and image.tobytes() == before
    assert size == (1, 1) or drawn.tobytes() != image.convert("RGB").tobytes()


NUMBERS = st.floats(-50, 700)
PLACES = st.tuples(NUMBERS, NUMBERS) | st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS).map(
    lambda at: (*sorted(at[::2]), *sorted(at[1::2]))
).map(lambda at: (at[0], at[2], at[1], at[3]))  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=30), PLACES, st.none() | st.floats(0, 1)), max_size=12))
def test_anything_is_drawn(found):
    colours = {}
    draw(GREY, [(box if len(at) == 4 else point)(label, *at, score=score) for label, at, score in found], colours)
    assert colours.keys() == {label for label, _, _ in found}


def test_labels_are_readable(written):
    """Inside the picture, beside each other, over all boxes and beside all points, on their own colour."""
    found = [box(f"label {i}", 40 * i, 30 * i, 40 * i + 150, 30 * i + 120) for i in range(10)]
    found += [point("spot", 50 * i, 240) for i in range(1, 12)]
    colours = {}
    drawn = np.asarray(draw(GREY, found, colours))
    words = [text for text, _ in written]
    assert {f"label {i} 0.90" for i in range(10)} | {"spot"} <= {*words}
    for index, (text, (left, top, right, bottom)) in enumerate(written):
        assert left >= 0 and top >= 0 and right <= 640 and bottom <= 480
        assert not any(overlap((left, top, right, bottom), other) for _, other in written[:index])
        inside = {
            tuple(pixel) for pixel in drawn[round(top) : round(bottom), round(left) : round(right)].reshape(-1, 3)
        }
        foreign = {colour for label, colour in colours.items() if label not in text}
        assert not inside & foreign, "no line runs through it"
    for one in found:
        if one.point:
            assert tuple(drawn[int(one.point[1]), int(one.point[0])]) == colours["spot"]


def test_a_long_label_is_cut_and_keeps_its_score(written):
    draw(GREY, [box(LONG, 10, 100, 630, 400, score=0.87)], {})
    ((text, (left, _, right, _)),) = written
    assert text.endswith("… 0.87") and text.startswith("the person") and right - left <= 0.4 * 640


def test_a_crowd_is_thinned(written):
    """The best have their label, and each label is there."""
    random = np.random.default_rng(0)
    corners = random.uniform(0, (600, 440), (300, 2))
    found = [box("person", *at, *at + 30, score=i / 300) for i, at in enumerate(corners)]
    colours = {}
    drawn = np.asarray(draw(GREY, [*found, box("bicycle", 300, 200, 340, 260, score=0.01)], colours))
    assert 5 < len(written) < 60 and any(text.startswith("bicycle") for text, _ in written)
    assert "person 1.00" in [text for text, _ in written] and "person 0.10" not in [text for text, _ in written]
    for one in found[::10]:
        x, y = (round((a + b) / 2) for a, b in zip(one.box[:2], one.box[2:], strict=True))
        strip = drawn[max(y - 20, 0) : y + 20, max(x - 20, 0) : x + 20].reshape(-1, 3)
        assert (strip == colours["person"]).all(1).any(), "each box is drawn"


def test_a_label_never_covers_a_small_picture(written):
    small = Image.new("RGB", (40, 24))
    draw(small, [box("red circle", 2, 2, 30, 20)], {})
    assert not written
    draw(Image.new("RGB", (112, 84)), [box("red circle", 20, 20, 60, 60)], {})
    assert [text for text, _ in written] == ["red circle"]


LETTERS = {"é ü ñ": "e u n", "ЖЁ": "??", "红色汽车": "????", "भारत": "???", "a\u0301": "a", "a\nb\x00\tc": "a b c"}


@pytest.mark.parametrize("label", LETTERS)
def test_letters(label, monkeypatch):
    """In a font that the system has; without one accents are dropped, and what is left unknown is a question mark."""
    for cached in (drawing._fonts, drawing._written):
        cached.cache_clear()
    letters = [c for c in label if c.isalpha()]
    fonts = [name for name in drawing._fonts() if all(drawing._has(name, c) for c in letters)]
    expected = {"a\u0301": "á", "a\nb\x00\tc": "a b c"}.get(label, label)
    assert drawing._written(label, 20)[1] == (expected if fonts else LETTERS[label])
    monkeypatch.setattr(drawing, "FONTS", ())
    for cached in (drawing._fonts, drawing._written):
        cached.cache_clear()
    assert drawing._written(label, 20)[1] == LETTERS[label]
    for cached in (drawing._fonts, drawing._written):
        cached.cache_clear()
