# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Fine-tuning by the windows' own objective, on transformers' Trainer (docs/finetuning.md)."""

from training.collator import MTPCollator
from training.objective import Marks

__all__ = ["MTPCollator", "Marks"]
