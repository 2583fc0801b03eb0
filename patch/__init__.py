# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""`import patch` in a clone. From anywhere else: this folder on the path, and `import locateanything_patch`."""

from .locateanything_patch import *  # noqa: F403
from .locateanything_patch import __all__, __version__  # noqa: F401
