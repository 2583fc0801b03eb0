# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Records → one pack, as transformers' Trainer asks its data collator."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from training.data import check, messages_of
from training.objective import Marks, sample_of
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
    """

    def __init__(self, processor: Any, max_length: int | None = None, none: str = "None", flex: bool = False):
        self.processor, self.max_length, self.none, self.flex = processor, max_length, none, flex
        self.marks = Marks.of(processor.tokenizer)

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
        samples = []
        for record, ids in zip(records, inputs["input_ids"], strict=True):
            sample = sample_of(ids, self.marks)
            if sample is None:
                raise ValueError(f"{record.get('name', 'record')}: has no answer to learn.")
            if self.max_length is not None and len(sample.ids) > self.max_length:
                told = f"{len(sample.ids)} tokens, {len(sample.anchors)} windows counted"
                raise ValueError(f"{record.get('name', 'record')}: {told}; max_length is {self.max_length}.")
            samples.append(sample)
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([[i for sample in samples for i in sample.ids]]),
            "position_ids": torch.tensor([[i for sample in samples for i in sample.positions]]),
            "labels": torch.tensor([[i for sample in samples for i in sample.targets]]),
            "windows": Pack(samples, self.marks, self.flex),
        }
        if "pixel_values" in inputs:
            return batch | {name: torch.as_tensor(inputs[name]) for name in ("pixel_values", "image_grid_hws")}
        # a picture that counts for none: in every process the same parameters have gradients
        size = self.processor.image_processor.patch_size
        return batch | {
            "pixel_values": torch.zeros(4, 3, size, size),
            "image_grid_hws": torch.tensor([[2, 2]]),
            "image_flags": torch.tensor([0]),
        }
