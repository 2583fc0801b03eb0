# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""What was published, loaded as its users load it, and asked about a picture."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.utils.sha import git_hash

from hub.assembly import MODEL_ENTRIES, PROJECT, build, is_weights, open_base, plan, remote_code_files
from hub.errors import HubError

IMAGE = PROJECT / "demo" / "images" / "1.png"
QUESTION = "Locate all the instances that matches the following description: red diamond</c>orange cross."


def verify(
    repo: str, revision: str | None = None, base: str | None = None, *, image: Path = IMAGE, question: str = QUESTION
) -> str:
    """Load a published repository or pull request, and ask it a question.

    Its files of this project are compared first; code that differs is not run. Of a pull request, the repository's own
    configuration class is run, as it is for each of its callers.

    Args:
        repo: its hub id.
        revision: branch, tag, commit or refs/pr/N.
        base: of a repository with the code alone, the weights' repository; what its card names by default.
        image: the picture to ask about.
        question: what to ask.

    Returns:
        The answer, with its special tokens.

    Raises:
        HubError: it holds another state of the code, or none.
    """
    from PIL import Image
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    api = HfApi()
    commit = api.model_info(repo, revision=revision, timeout=30).sha
    there = {entry.path: getattr(entry, "blob_id", None) for entry in api.list_repo_tree(repo, revision=commit)}
    needed = remote_code_files(MODEL_ENTRIES)
    for path in remote_code_files():
        if (path.name in there or path in needed) and there.get(path.name) != git_hash(path.read_bytes()):
            raise HubError(f"repo: {repo} at {commit} has another {path.name} than this project, or none; not loaded")
    options = {"revision": commit, "trust_remote_code": True}
    config = AutoConfig.from_pretrained(repo, **options)
    weights = {"pretrained_model_name_or_path": repo, **options}
    if not any(map(is_weights, there)):
        base = base or ModelCard.load(hf_hub_download(repo, "README.md", revision=commit)).data.base_model
        weights = {"pretrained_model_name_or_path": base, "trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(config=config, dtype="auto", **weights).eval()
    with tempfile.TemporaryDirectory() as scratch:
        place: str | Path = repo
        if "processing.py" not in there:  # a pull request without: ours, on its files
            files = plan(open_base(repo, commit, download=False, hub_id=True))
            place = Path(scratch, "processor")
            build({name: content for name, content in files.items() if not is_weights(name)}, place)
        processor = AutoProcessor.from_pretrained(place, **options)
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=256)
    return str(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])[0])
