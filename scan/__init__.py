# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Scans: any number of pictures, videos and lists of them, each asked the same questions, into records on disk."""
