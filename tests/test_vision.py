"""The vision tower: many images in one pass equal each image alone, in any order and grouping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locateanything.configuration import MoonViTConfig
from locateanything.vision import MoonViTModel, PositionGrid, rotary_table, rotate_pairs
from tests.conftest import model_of

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda size: (2 * size[0], 2 * size[1]))


def pixels(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(h * w for h, w in sizes), 3, 14, 14, generator=generator)


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=6))
def test_a_pack_equals_each_image_alone(sizes):
    tower = model_of("shapes").vision_model
    patches = pixels(sizes)
    with torch.no_grad():
        packed = tower(patches, sizes)
        for image, size, feature in zip(patches.split([h * w for h, w in sizes]), sizes, packed, strict=True):
            (alone,) = tower(image, [size])
            assert feature.shape == (size[0] * size[1] // 4, 4 * tower.config.hidden_size)
            torch.testing.assert_close(feature, alone, atol=1e-5, rtol=1e-5)


def test_images_are_encoded_in_passes_of_bounded_size(monkeypatch):
    model, sizes = model_of("shapes"), [(2, 4), (8, 8), (2, 2), (4, 4), (2, 2)]
    patches = pixels(sizes)
    with torch.no_grad():
        at_once = model.extract_feature(patches, torch.tensor(sizes))
        passes = []
        forward = model.vision_model.forward
        monkeypatch.setattr(model.vision_model, "forward", lambda p, s: passes.append(len(p)) or forward(p, s))
        in_parts = model.extract_feature(patches, torch.tensor(sizes), patches_a_pass=20)
        by_image = list(patches.split([height * width for height, width in sizes]))
        by_row = [torch.cat(by_image[:2]), torch.cat(by_image[2:])]
        listed = [model.extract_feature(each, torch.tensor(sizes)) for each in (by_image, by_row)]
    assert passes[:3] == [16, 16, 64]
    for one, *others in zip(at_once, in_parts, *listed, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_stays_inside_an_image(implementation):
    tower = MoonViTModel(
        MoonViTConfig(
            hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48,
            attn_implementation=implementation,
        )
    ).eval()  # fmt: skip
    sizes = [(2, 4), (4, 2), (2, 4)]
    patches = pixels(sizes)
    with torch.no_grad():
        before = tower(patches, sizes)
        patches[8:16] += 1
        after = tower(patches, sizes)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1])


def test_the_position_grid_is_used_as_it_is_at_its_own_size():
    grid = PositionGrid(
        MoonViTConfig(hidden_size=8, num_attention_heads=2, init_pos_emb_height=4, init_pos_emb_width=6)
    )
    torch.nn.init.normal_(grid.weight)
    assert torch.equal(grid([(4, 6)]), grid.weight.flatten(0, 1))
    resampled = torch.nn.functional.interpolate(grid.weight.permute(2, 0, 1)[None], size=(2, 4), mode="bicubic")
    torch.testing.assert_close(grid([(2, 4)]), resampled[0].flatten(1).T)


def test_rotary_pairs_alternate_column_and_row():
    height, width, head_dim = 3, 5, 8
    angles = rotary_table(height, width, head_dim, torch.device("cpu"))
    assert angles.shape == (15, 4)
    row, column = 2, 3
    expected = [column, row, column * 10000 ** (-4 / 8), row * 10000 ** (-4 / 8)]
    torch.testing.assert_close(angles[row * width + column], torch.tensor(expected))
    x = torch.randn(15, 2, head_dim)
    rotated = torch.empty_like(x)
    for pair, angle in enumerate(angles.T):
        one, two, cos, sin = x[..., 2 * pair], x[..., 2 * pair + 1], angle.cos()[:, None], angle.sin()[:, None]
        rotated[..., 2 * pair], rotated[..., 2 * pair + 1] = one * cos - two * sin, one * sin + two * cos
    rotations = torch.complex(angles.cos(), angles.sin())
    torch.testing.assert_close(rotate_pairs(x, rotations), rotated)
    both = torch.stack((x, -x), 1)[..., :4]  # more dimensions, and not contiguous
    torch.testing.assert_close(rotate_pairs(both, rotations[:, :2]), torch.stack((rotated, -rotated), 1)[..., :4])


def test_merging_takes_two_by_two_in_row_column_order():
    tower = model_of("shapes").vision_model
    features = torch.arange(4 * 4).float().unsqueeze(1)  # a 4×4 grid, one channel
    merged = tower.merge(features, 4, 4)
    assert merged.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
