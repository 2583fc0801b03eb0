# Copyright 2026 The LocateAnything-batched authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The process that `verify` starts: loads a published model and a local folder as users do, and prints two answers."""

import json
import sys
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor


def answer(model: Any, processor: Any, image: str, question: str) -> str:
    """What a model says of a picture."""
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.eval().generate(**inputs, max_new_tokens=256)
    return str(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])[0])


def main(asked: dict[str, Any]) -> dict[str, str]:
    """Load both, one after the other, and ask them the same."""
    options = {"trust_remote_code": True}
    ours = {**options, "revision": asked["revision"]} if asked["revision"] else options
    if asked["base"]:
        config = AutoConfig.from_pretrained(asked["repo"], **ours)
        where = {**options, "revision": asked["base_revision"], "code_revision": asked["revision"]}
        model = AutoModel.from_pretrained(asked["base"], config=config, dtype="auto", **where)
    else:
        model = AutoModel.from_pretrained(asked["repo"], dtype="auto", **ours)
    processor = AutoProcessor.from_pretrained(asked["repo"], **ours)
    published = answer(model, processor, asked["image"], asked["question"])
    del model
    model = AutoModel.from_pretrained(asked["local"], dtype="auto", **options)
    processor = AutoProcessor.from_pretrained(asked["local"], **options)
    return {"published": published, "local": answer(model, processor, asked["image"], asked["question"])}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
