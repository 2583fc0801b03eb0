# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Records → one pack, as transformers' Trainer asks its data collator."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from image_processing import load_image
from training.data import check, messages_of
from training.objective import Marks, Sample, sample_of
from training.pack import Pack


class MTPCollator:
    """Makes a training batch of records: their samples side by side, which nothing pads.

        Trainer(model=model, args=args, train_dataset=records, data_collator=MTPCollator(processor))

    TrainingArguments need `remove_unused_columns=False`.

    Args:
        processor: the checkpoint's.
        max_length: a longer sample, windows counted, is refused. None: any length.
        none: the word of an answer that finds nothing, which is what the config's `none_token_id` spells.
        flex: attend by FlexAttention (for CUDA).
        windows: False for next-token loss alone, by which every mode but "slow" and "verified" unlearns.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        none: str = "None",
        flex: bool = False,
        windows: bool = True,
    ):
        self.processor, self.max_length, self.none = processor, max_length, none
        self.flex, self.windows, self.marks = flex, windows, Marks.of(processor.tokenizer)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Records (see `training.data`) → `input_ids`, `position_ids`, `labels`, `[1, T]` long, the last aligned;
        `windows`, a `Pack`; and the pictures, as the processor gives them.

        Raises:
            ValueError: a record that is not as the model answers, or nothing to learn in one. The message names it.
        """
        for record in records:
            check(record, self.none)
        talks = [messages_of(record) for record in records]
        inputs = self.processor.apply_chat_template(talks, tokenize=True, return_dict=True, return_tensors=None)
        pairs = zip(records, inputs["input_ids"], strict=True)
        samples = [self.sample(ids, record.get("name", "record")) for record, ids in pairs]
        fields = {"input_ids": "ids", "position_ids": "positions", "labels": "targets"}
        batch: dict[str, Any] = {
            name: torch.tensor([[i for sample in samples for i in getattr(sample, field)]])
            for name, field in fields.items()
        }
        batch["windows"] = Pack(samples, self.marks, self.flex)
        if "pixel_values" in inputs:
            return batch | {name: torch.as_tensor(inputs[name]) for name in ("pixel_values", "image_grid_hws")}
        # a picture that counts for none: in every process the same parameters have gradients
        size = self.processor.image_processor.patch_size
        nothing = {"image_grid_hws": torch.tensor([[2, 2]]), "image_flags": torch.tensor([0])}
        return {**batch, **nothing, "pixel_values": torch.zeros(4, 3, size, size)}

    def sample(self, ids: list[int], name: str, more: int = 0) -> Sample:
        """more: tokens that are not in `ids` yet."""
        sample = sample_of(ids, self.marks, self.windows)
        if sample is None:
            raise ValueError(f"{name}: has no answer to learn.")
        if self.max_length is not None and len(sample.ids) + more > self.max_length:
            told = f"{len(sample.ids) + more} tokens, {len(sample.anchors)} windows counted"
            raise ValueError(f"{name}: {told}; max_length is {self.max_length}.")
        return sample

    def check(self, record: Mapping[str, Any]) -> None:
        """What a call would say of a record, at the cost of reading its pictures.

        Raises:
            ValueError, KeyError, TypeError: as a call does.
        """
        name = record.get("name", "record")
        if "error" in record:
            raise ValueError(f"{name}: {record['error']}")
        check(record, self.none)
        messages, more, images = messages_of(record), 0, self.processor.image_processor
        for item in (item for message in messages for item in message["content"] if item["type"] == "image"):
            picture = load_image(item, upright=images.upright)
            more += images.get_number_of_image_tokens(picture.height, picture.width)
            if tuple(record.get("size", picture.size)) != picture.size:
                raise ValueError(f"{name}: its picture is {picture.size} upright; its boxes are of {record['size']}.")
        text = self.processor.apply_chat_template(messages)
        text = re.sub("<image-([0-9]+)>", r"<image \1><img></img>", text)
        self.sample(self.processor.tokenizer(text)["input_ids"], name, more)
