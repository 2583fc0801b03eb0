"""Fixtures: the flat remote-code files as a package, the golden cases, the small checkpoints."""

from __future__ import annotations

import functools
import json
import signal
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "goldens"
CHECKPOINTS = {name: GOLDENS / name / "checkpoint" for name in ("shapes", "shapes-early")}

# The remote-code files import each other relatively, as transformers lays them out; here their folder is the package.
package = types.ModuleType("locateanything")
package.__path__ = [str(ROOT)]
sys.modules["locateanything"] = package
sys.path.insert(0, str(ROOT))  # the scripts, imported as a user of a clone would

# A shell that runs this in the background ignores Ctrl-C, and so would all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A configuration file as the stock's: it knows nothing of ours, and keeps all it is given.
STOCK_CONFIGURATION = """
from transformers import PretrainedConfig, Qwen2Config

class MoonViTConfig(PretrainedConfig):
    model_type = "moonvit"

class LocateAnythingConfig(PretrainedConfig):
    model_type = "locateanything"
    sub_configs = {"vision_config": MoonViTConfig, "text_config": Qwen2Config}

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        self.vision_config = MoonViTConfig(**(vision_config or {}))
        self.text_config = Qwen2Config(**(text_config or {}))
        super().__init__(**kwargs)
"""

torch.set_num_threads(1)  # the models are tiny, and the tests run side by side


# A seed gives other draws in other builds of torch (2.6 for CUDA, say); recorded samples are then no reference.
RECORDED_DRAWS = [32, 12, 9]


@functools.lru_cache
def draws_as_recorded() -> bool:
    p = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    return torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3)).flatten().tolist() == RECORDED_DRAWS


@functools.lru_cache
def recorded_cases(name: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDENS / name / "cases.jsonl").read_text().splitlines()]


@functools.lru_cache
def cases_of(name: str) -> list[dict]:
    """The recorded runs; without the sampled ones where this torch draws other numbers than the recording one."""
    return [case for case in recorded_cases(name) if "seed" not in case or draws_as_recorded()]


@functools.lru_cache
def model_of(name: str):
    from locateanything.modeling_locateanything_batched import LocateAnythingBatchedForConditionalGeneration

    return LocateAnythingBatchedForConditionalGeneration.from_pretrained(CHECKPOINTS[name]).eval()


@functools.lru_cache
def tokenizer_of(name: str):
    """The checkpoint's tokenizer; not by AutoTokenizer, which would ask for the code that config.json names."""
    from transformers import Qwen2TokenizerFast

    return Qwen2TokenizerFast.from_pretrained(CHECKPOINTS[name])


@functools.cache
def processor_of(name: str = "shapes"):
    from locateanything.processing import LocateAnythingImageProcessor, LocateAnythingProcessor

    return LocateAnythingProcessor(LocateAnythingImageProcessor.from_pretrained(CHECKPOINTS[name]), tokenizer_of(name))


@functools.cache
def pixels_of(name: str, image: str):
    """(pixel_values, (rows, columns)) of a golden picture."""
    from locateanything.image_processing import load_image
    from locateanything.processing import LocateAnythingImageProcessor

    processor = LocateAnythingImageProcessor.from_pretrained(CHECKPOINTS[name])
    out = processor.preprocess([load_image(GOLDENS / name / "images" / image)], return_tensors="pt")
    return out["pixel_values"], out["image_grid_hws"][0].tolist()


RECIPE = ("repetition_penalty", "temperature", "top_p", "top_k")


class Batch:
    """Golden cases as one left-padded batch, ready for `generate`."""

    def __init__(self, name: str, cases: list[dict], extra_padding: int = 0):
        self.model, self.cases = model_of(name), cases
        width = max(len(case["input_ids"]) for case in cases) + extra_padding
        pad = self.model.config.pad_token_id
        rows = [[pad] * (width - len(case["input_ids"])) + case["input_ids"] for case in cases]
        self.input_ids = torch.tensor(rows)
        self.attention_mask = torch.tensor(
            [[0] * (width - len(c["input_ids"])) + [1] * len(c["input_ids"]) for c in cases]
        )
        images = [pixels_of(name, image) for case in cases for image in case["images"]]
        self.inputs = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "pixel_values": torch.cat([pixels for pixels, _ in images]),
            "image_grid_hws": torch.tensor([grid for _, grid in images]),
        }
        self.settings = {
            "generation_mode": [case["generation_mode"] for case in cases],
            "verify_labels": [case.get("verify_labels", False) for case in cases],
            "max_new_tokens": [case["max_new_tokens"] for case in cases],
            "repetition_penalty": [case.get("repetition_penalty", 1.0) for case in cases],
            "temperature": [case.get("temperature", 0.0) for case in cases],
            "top_p": [case.get("top_p", 1.0) for case in cases],
            "top_k": [case.get("top_k", 0) for case in cases],
        }

    def generators(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(case.get("seed", 0)) for case in self.cases]

    def run(self, **kwargs):
        settings = {**self.settings, "generator": self.generators(), "return_dict_in_generate": True, **kwargs}
        return self.model.generate(**self.inputs, **settings)

    def answers(self, output) -> list[list[int]]:
        """Each row's new ids without the padding behind them; what stands behind must be padding."""
        sequences = getattr(output, "sequences", output)[:, self.input_ids.shape[1] :].tolist()
        pad = self.model.config.pad_token_id
        answers = []
        for row, case in zip(sequences, self.cases, strict=True):
            length = len(case["output_ids"])
            assert all(token == pad for token in row[length:]), "tokens behind the expected end"
            answers.append(row[:length])
        return answers

    def expected(self) -> list[list[int]]:
        return [case["output_ids"] for case in self.cases]


@pytest.fixture(scope="session", params=["shapes", "shapes-early"])
def golden(request) -> str:
    """The name of a set of goldens."""
    return request.param


@pytest.fixture(scope="session")
def shapes():
    return model_of("shapes")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of processes that tests start: a cache of their own, in which the model is assembled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
