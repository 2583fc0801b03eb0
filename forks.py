# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Processes that were forked: torch's threads do not come along."""

from __future__ import annotations

import os

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

IMPORTED_IN = os.getpid()  # a forked process inherits its parent's


def mind_a_fork() -> None:
    """In a process forked after this code was imported, torch would wait for ever for threads that its parent had."""
    if os.getpid() != IMPORTED_IN and torch.get_num_threads() > 1:
        logger.warning(
            "this process was forked from one that had imported this code; torch's threads do not survive a fork and "
            f"are set from {torch.get_num_threads()} to 1. Start processes with spawn to have more."
        )
        torch.set_num_threads(1)


__all__ = ["mind_a_fork"]
