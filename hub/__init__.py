# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""What upload_to_hub.py does: assembly, publishing, verifying; the texts that go along; errors in a line."""
