# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Goes when nothing imports it any more: see image_processing.py."""

from .image_processing import load_image, load_video, shorten

__all__ = ["load_image", "load_video", "shorten"]
