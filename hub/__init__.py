# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""What upload_to_hub.py does: assembly, publishing, verifying; the texts that go along; errors in a line."""
