"""Sharing: equal images are encoded once, common prompt prefixes computed once."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from locateanything.inputs import Pictures
from locateanything.kv_cache import PrefillStep, common_prefix, content_of, in_passes, share_prefixes
from locateanything.rows import Picture
from tests.conftest import Batch, cases_of

IMAGE = 9


def test_content_tells_images_apart():
    tokens = [1, IMAGE, IMAGE, 2, IMAGE, 3]
    one = content_of(tokens, IMAGE, [0, 4], [2, 1])
    assert one.tolist() == [1, -1, -1, 2, -5, 3]
    assert common_prefix(one, content_of(tokens, IMAGE, [0, 5], [2, 1])) == 4
    assert common_prefix(one, one) == 6 and common_prefix(one, one[:2]) == 2


ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(0, 9)), min_size=1, max_size=6)


def contents(rows) -> list[np.ndarray]:
    """Rows of one of three beginnings and a tail of their own."""
    return [np.array([100 + kind] * 40 + [tail] * length) for kind, length, tail in rows]


@given(held=ROWS, entering=ROWS, offset=st.integers(0, 3))
def test_a_plan_gives_every_row_its_content(held, entering, offset):
    """Carried out on toy slots, a plan leaves in each entering slot exactly that row's content."""
    slots = dict(enumerate(contents(held)))
    wanted = {slot + offset: content for slot, content in enumerate(contents(entering))}
    first, second = share_prefixes(wanted, dict(slots))
    assert sorted(chunk.slot for chunk in first + second) == sorted(wanted)
    state = {slot: content.tolist() for slot, content in slots.items()}
    for chunks in (first, second):
        for chunk in chunks:
            state[chunk.slot] = state[chunk.donor][: chunk.start] if chunk.start else []
        for chunk in chunks:
            assert chunk.stop == len(wanted[chunk.slot])
            state[chunk.slot] += wanted[chunk.slot].tolist()[chunk.start :]
    for slot, content in wanted.items():
        assert state[slot] == content.tolist()
    for slot in slots.keys() - wanted.keys():
        assert state[slot] == slots[slot].tolist(), "rows that stay are not touched"


def test_little_is_not_shared():
    short = {slot: np.array([1] * 15 + [slot]) for slot in range(2)}
    assert share_prefixes(short, {})[1] == []
    long_tail = {slot: np.array([1] * 20 + [slot + 2] * 100) for slot in range(2)}
    assert share_prefixes(long_tail, {})[1] == []
    worth = {slot: np.array([1] * 20 + [slot + 2] * 20) for slot in range(2)}
    first, second = share_prefixes(worth, {})
    assert [chunk.slot for chunk in first] == [0]
    assert [(chunk.slot, chunk.start, chunk.donor) for chunk in second] == [(1, 20, 0)]


def test_passes_respect_the_budget():
    chunks = share_prefixes({slot: np.full(30, slot) for slot in range(5)}, {})[0]
    assert [len(group) for group in in_passes(chunks, 70)] == [2, 2, 1]
    assert [len(group) for group in in_passes(chunks, 10)] == [1] * 5, "one row at least"


def numbers_of(images: list[torch.Tensor], sizes: list = ()) -> list[int]:
    """What tells an engine's pictures apart."""
    shown = [Picture(image, size, 1) for image, size in zip_longest(images, sizes)]
    pictures = Pictures(model=None)
    return [pictures.shared(picture).number for picture in shown]


def test_a_wide_and_a_high_picture_of_one_colour_are_two_pictures():
    """Their patches are equal, one after another; where they lie is not."""
    wide, high = torch.ones(6, 3, 14, 14), torch.ones(6, 3, 14, 14)
    assert numbers_of([wide, high], [(2, 3), (3, 2)]) == [0, 1]
    assert numbers_of([wide, high], [(2, 3), (2, 3)]) == [0, 0]

    case = next(c for c in cases_of("shapes") if c["generation_mode"] == "slow" and c["image_grid_hws"] == [[6, 8]])
    batch = Batch("shapes", [case, case])
    pixels = torch.full((96, 3, 14, 14), 0.3)
    grids = [[6, 8], [8, 6]]
    together = batch.model.generate(**{**batch.inputs, "pixel_values": pixels, "image_grid_hws": torch.tensor(grids)})
    features = batch.model.extract_feature(pixels, torch.tensor(grids))
    assert not torch.equal(*features)
    for row, grid in enumerate(grids):
        alone = batch.model.generate(
            input_ids=batch.input_ids[row : row + 1],
            attention_mask=batch.attention_mask[row : row + 1],
            pixel_values=pixels[:48],
            image_grid_hws=torch.tensor([grid]),
        )
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_equal_images_are_found_by_object_and_by_content():
    one, other = torch.rand(4, 3), torch.rand(4, 3)
    assert numbers_of([one, other, one, other.clone(), one.view(3, 4)]) == [0, 1, 0, 1, 2]
    almost = one.clone()
    almost[2, 1] += 1e-6
    assert numbers_of([one, almost]) == [0, 1]


class Spy:
    """Counts what a model computes."""

    def __init__(self, model, monkeypatch):
        self.prefilled, self.patches = [], []
        decode, extract = model.decode, model.extract_feature

        def counted_decode(embeddings, step, cache):
            if isinstance(step, PrefillStep):
                self.prefilled.append(len(embeddings))
            return decode(embeddings, step, cache)

        def counted_extract(pixel_values, *args, **kwargs):
            self.patches.append(sum(map(len, pixel_values)))
            return extract(pixel_values, *args, **kwargs)

        monkeypatch.setattr(model, "decode", counted_decode)
        monkeypatch.setattr(model, "extract_feature", counted_extract)


def questions_of_one_picture() -> list[dict]:
    by_picture: dict[str, list[dict]] = {}
    for case in cases_of("shapes"):
        if "seed" not in case and len(case["images"]) == 1 and case["generation_mode"] == "fast":
            by_picture.setdefault(case["images"][0], []).append(case)
    return max(by_picture.values(), key=len)


def test_one_image_many_questions_is_encoded_and_prefilled_once(monkeypatch):
    cases = questions_of_one_picture()[:1] * 2 + questions_of_one_picture()
    for slots in (None, 1, 2):
        batch = Batch("shapes", cases)
        with monkeypatch.context() as patch:
            spy = Spy(batch.model, patch)
            assert batch.answers(batch.run(max_batch_rows=slots)) == batch.expected()
        patches = int(batch.inputs["image_grid_hws"][0].prod())
        assert sum(spy.patches) == patches, "the picture is encoded once"
        whole = len(cases[0]["input_ids"]) - 1
        tails = sum(len(case["input_ids"]) for case in cases) - len(cases) * patches // 4
        assert sum(spy.prefilled) <= whole + tails, "image tokens are prefilled once"
        assert sum(spy.prefilled) < sum(len(case["input_ids"]) for case in cases) / 2


def test_different_images_share_nothing_but_stay_right(monkeypatch):
    cases = list({case["images"][0]: case for case in cases_of("shapes") if "seed" not in case}.values())[:6]
    batch = Batch("shapes", cases)
    spy = Spy(batch.model, monkeypatch)
    assert batch.answers(batch.run()) == batch.expected()
    assert sum(spy.patches) == int(batch.inputs["image_grid_hws"].prod(1).sum())


def test_a_changed_pixel_is_another_image(monkeypatch):
    """The same question twice, the second picture with one value changed: nothing of the image is shared."""
    case = questions_of_one_picture()[0]
    batch = Batch("shapes", [case, case])
    pixels = batch.inputs["pixel_values"].clone()
    pixels[-1, 0, 0, 0] += 0.5
    batch.inputs["pixel_values"] = pixels
    spy = Spy(batch.model, monkeypatch)
    batch.run()
    assert sum(spy.patches) == len(pixels)


def test_nan_in_one_picture_stays_in_its_row():
    """Under a causal mask NaN reaches earlier tokens too (0 × NaN): such a prefix must not be shared."""
    cases = list({case["images"][0]: case for case in cases_of("shapes") if "seed" not in case}.values())[:5]
    for slots in (None, 1, 2):
        batch = Batch("shapes", cases)
        patches = batch.inputs["image_grid_hws"].prod(1).tolist()
        batch.inputs["pixel_values"] = batch.inputs["pixel_values"].clone()
        batch.inputs["pixel_values"][: patches[0]] = float("nan")
        output = batch.run(max_batch_rows=slots)
        new = output.sequences[:, batch.input_ids.shape[1] :].tolist()
        for row, case in zip(new[1:], cases[1:], strict=True):
            assert row[: len(case["output_ids"])] == case["output_ids"]
