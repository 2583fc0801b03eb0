# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""The model behind HTTP: pictures in (images), OpenAI's shapes (openai), the engine (engine), routes (app), the door
(guard). `serve.py` is its command line, docs/serving.md its page."""
