"""left_padded: a batch padded on the right, turned round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BatchFeature
from transformers.tokenization_utils_base import BatchEncoding

from locateanything.prompts import left_padded
from tests.conftest import Batch, cases_of

IDS = [[5, 6, 7, 0, 0], [1, 2, 3, 4, 5], [0, 8, 9, 0, 0]]
MASK = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]


@pytest.mark.parametrize("kind", [dict, BatchFeature, BatchEncoding])
def test_rows_go_to_the_right_and_the_rest_stays(kind):
    pixels, grids = torch.zeros(4, 3, 14, 14), np.array([[2, 2]])
    inputs = kind(
        {
            "input_ids": torch.tensor(IDS),
            "attention_mask": torch.tensor(MASK),
            "pixel_values": pixels,
            "image_grid_hws": grids,
        }
    )
    turned = left_padded(inputs)
    assert type(turned) is kind and list(turned) == list(inputs)
    assert turned["input_ids"].tolist() == [[0, 0, 5, 6, 7], [1, 2, 3, 4, 5], [0, 0, 0, 8, 9]]
    assert turned["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert turned["pixel_values"] is pixels and turned["image_grid_hws"] is grids
    assert inputs["input_ids"].tolist() == IDS and inputs["attention_mask"].tolist() == MASK, "the batch given stays"
    assert left_padded(turned)["input_ids"].tolist() == turned["input_ids"].tolist()


def test_dtypes_stay_and_lists_and_arrays_are_taken():
    for ids, mask in ((IDS, MASK), (np.array(IDS), np.array(MASK))):
        turned = left_padded({"input_ids": ids, "attention_mask": mask})
        assert turned["input_ids"].tolist()[0] == [0, 0, 5, 6, 7]
    turned = left_padded({"input_ids": torch.tensor(IDS).int(), "attention_mask": torch.tensor(MASK).bool()})
    assert turned["input_ids"].dtype == torch.int32 and turned["attention_mask"].dtype == torch.bool
    small = left_padded({"input_ids": torch.tensor(IDS, dtype=torch.uint16), "attention_mask": torch.tensor(MASK)})
    assert small["input_ids"].dtype == torch.uint16 and small["input_ids"].tolist()[0] == [0, 0, 5, 6, 7]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.tensor(IDS), "got a Tensor; expected the processor's output whole"),
        ({"input_ids": torch.tensor(IDS)}, "got no attention_mask; its inputs have input_ids"),
        ({"pixel_values": None}, "got no input_ids and no attention_mask"),
        ({"input_ids": [[1], [1, 2]], "attention_mask": [[1], [1, 1]]}, "padding=True"),
        ({"input_ids": torch.tensor(IDS).to_sparse(), "attention_mask": MASK}, r"input_ids: got a torch\.sparse_coo"),
        (
            {"input_ids": IDS, "attention_mask": torch.tensor(MASK, device="meta")},
            "attention_mask: got a .* meta device",
        ),
        ({"input_ids": torch.tensor(IDS).float(), "attention_mask": MASK}, r"input_ids of torch\.float32; expected"),
        ({"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)[:2]}, r"\[3, 5\].*\[2, 5\]"),
        ({"input_ids": torch.tensor(IDS[0]), "attention_mask": torch.tensor(MASK[0])}, r"expected \[rows, length\]"),
    ],
)
def test_what_cannot_be_turned_is_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        left_padded(inputs)


def right_padded(batch: Batch) -> dict:
    """The batch as the stock's processor makes it: padding on the right, grids as numpy."""
    order = (batch.attention_mask == 0).long().argsort(dim=1, stable=True)
    return {
        **batch.inputs,
        "input_ids": batch.input_ids.gather(1, order),
        "attention_mask": batch.attention_mask.gather(1, order),
        "image_grid_hws": batch.inputs["image_grid_hws"].numpy(),
    }


def test_a_batch_padded_on_the_right_is_refused_by_the_name_of_the_remedy_and_answered_after_it():
    batch = Batch("shapes", [case for case in cases_of("shapes") if "seed" not in case][:6:2], extra_padding=3)
    wrong = right_padded(batch)
    with pytest.raises(ValueError, match=r"attention_mask pads on the right.*left_padded\(inputs\)"):
        batch.model.generate(**wrong)
    with pytest.raises(ValueError, match=r"input_ids pad on the right.*left_padded\(inputs\)"):
        batch.model.generate(**{**wrong, "attention_mask": None})
    batch.inputs = left_padded(wrong)
    assert batch.answers(batch.run()) == batch.expected()
