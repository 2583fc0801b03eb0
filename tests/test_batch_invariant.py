"""generate(batch_invariant=True): whatever is computed of a row has shapes that follow from the row alone.

Equal shapes are what a test without a GPU can show: kernels, and so the order of their sums, are chosen by shape.
Values are compared beside it, on CPU at widths where they depend on the batch otherwise, and on CUDA.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from typing import Any

import pytest
import torch

import locateanything.cuda_graphs as cuda_graphs
from locateanything.configuration import LocateAnythingConfig
from locateanything.generation import GenerationLoop
from locateanything.model_runner import ModelRunner
from locateanything.modeling_locateanything_batched import LocateAnythingBatchedForConditionalGeneration
from tests.conftest import CHECKPOINTS, Batch, cases_of
from tests.pretend_device import Generator, Operation, PretendDevice


class Shapes:
    """What is computed of each row and picture, as digests of the operations: names, shapes, strides, dtypes.

    Attributes:
        of: by ("row", case) or ("picture", its pixels) a digest for each pass or decision it took part in.
    """

    def __init__(self, device: PretendDevice, monkeypatch: pytest.MonkeyPatch, model: Any):
        self.device, self.of, self.cases = device, defaultdict(list), []
        prefill, loop_prefill = ModelRunner.prefill, GenerationLoop.prefill
        step, compute, decide = ModelRunner.step_together, ModelRunner.compute, ModelRunner.decide
        tower, project = model.vision_model, model.project
        rows: list[Any] = []

        def entering(loop, chunks):
            rows[:] = [loop.active[chunk.slot] for chunk in chunks]
            loop_prefill(loop, chunks)

        def stepping(runner, active, chosen):
            rows[:] = chosen.values()
            return step(runner, active, chosen)

        monkeypatch.setattr(GenerationLoop, "prefill", entering)
        monkeypatch.setattr(ModelRunner, "step_together", stepping)
        monkeypatch.setattr(ModelRunner, "prefill", lambda *args: self.noted(self.keys(rows), prefill, *args))
        monkeypatch.setattr(ModelRunner, "compute", lambda *args: self.noted(self.keys(rows), compute, *args))
        monkeypatch.setattr(ModelRunner, "decide", lambda *args: self.noted(self.keys(args[1]), decide, *args))
        forward = tower.forward
        monkeypatch.setattr(tower, "forward", lambda *args: self.noted(pictures(args[0]), forward, *args))
        monkeypatch.setattr(model, "project", lambda given: self.noted(pictures(*given), project, given))

    def keys(self, rows) -> list[tuple]:
        return [("row", self.cases[row.index]) for row in rows]

    def noted(self, keys: list, function, *args):
        start = len(self.device.operations)
        result = function(*args)
        passed = filter(None, map(numeric, self.device.operations[start:]))
        digest = hashlib.sha256(repr([*passed]).encode()).hexdigest()
        for key in keys:
            self.of[key].append(digest)
        return result

    def taken(self) -> dict:
        told = dict(self.of)
        self.of.clear()
        return told


def pictures(*tensors) -> list[tuple]:
    return [("picture", hashlib.sha256(each.cpu().numpy().tobytes()).hexdigest()) for each in tensors]


def numeric(operation: Operation) -> tuple | None:
    """An operation on numbers that a row's answer can depend on; the cache is made, and written to, without any. How
    far a slot of it is from the next, the outermost stride of four, says where numbers lie and nothing else."""
    if operation.name.startswith(("new_zeros", "index_put")) or not any(
        dtype.is_floating_point for *_, dtype in operation.tensors
    ):
        return None
    return operation.name, [
        (tuple(shape), strides[1:] if len(shape) == 4 else strides, dtype)
        for shape, strides, dtype in operation.tensors
    ]


def some_cases(count: int) -> list[dict]:
    """Of all modes, greedy and sampled, some with longer prompts."""
    chosen = random.Random(1).sample(cases_of("shapes"), count)
    text = [case for case in chosen if len(case["input_ids"]) > 30]
    for number, case in enumerate(chosen):
        start = text[0]["input_ids"][:6] * (9 if number % 3 == 0 else 0)
        chosen[number] = {**case, "input_ids": start + case["input_ids"], "max_new_tokens": 3 + number % 5}
    return chosen


def run(device: PretendDevice, model, cases: list[dict], slots: int | None, **options):
    batch = Batch("shapes", cases)
    batch.model = model
    batch.generators = lambda: [Generator().manual_seed(case.get("seed", 0)) for case in cases]
    return batch.run(max_batch_rows=slots, **options)


@pytest.mark.parametrize("compositions", [5, pytest.param(300, marks=pytest.mark.slow)])
def test_shapes_follow_from_the_row_alone(compositions, monkeypatch):
    cases, draw = some_cases(8), random.Random(compositions)
    with PretendDevice() as device:
        model = device.put_model(Batch("shapes", cases).model)
        shapes = Shapes(device, monkeypatch, model)
        alone: dict = {}
        for number, case in enumerate(cases):
            shapes.cases = [number]
            run(device, model, [case], None, batch_invariant=True)
            alone |= shapes.taken()
        assert all(alone.values()) and len({len(passes) for passes in alone.values()}) > 3
        for _ in range(compositions):
            shapes.cases = draw.sample(range(len(cases)), draw.randint(2, 5))
            slots = draw.choice([None, 1, 2, 3, 5])
            run(device, model, [cases[case] for case in shapes.cases], slots, batch_invariant=True)
            for key, passes in shapes.taken().items():
                assert passes == alone[key][: len(passes)] and (key[0] == "picture" or len(passes) == len(alone[key]))
        shapes.cases = [*range(5)]
        run(device, model, cases[:5], None)
        assert all(passes != alone[key] for key, passes in shapes.taken().items() if key[0] == "row"), (
            "else it is blind"
        )


# ---- values


def wide_model(dtype: torch.dtype, hidden: int, intermediate: int, device: str = "cpu"):
    """One layer as wide as told, random weights."""
    config = LocateAnythingConfig.from_pretrained(CHECKPOINTS["shapes"])
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": hidden // 128}
    shape |= {"num_key_value_heads": 1, "num_hidden_layers": 1, "layer_types": ["full_attention"], "head_dim": 128}
    for name, value in shape.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    return LocateAnythingBatchedForConditionalGeneration(config).to(device, dtype).eval()


def answers(model, cases: list[dict], **options) -> list[tuple]:
    """Tokens and scores of each row, to the bit."""
    batch = Batch("shapes", cases)
    batch.model, width = model, batch.input_ids.shape[1]
    batch.inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
    output = batch.run(output_scores=True, generator=None, **options)
    counts = (output.accepted_by >= 0).sum(1).tolist()
    scores = output.token_log_probs.view(torch.int32).tolist()
    tokens = output.sequences[:, width:].tolist()
    return [(tokens[row][:count], scores[row][:count]) for row, count in enumerate(counts)]


def rows_that_differ(model, compositions: int, **options) -> int:
    """Rows of random batches whose tokens or scores are not those of the row alone."""
    modes = ("slow", "hybrid", "slow", "verified")
    plain = random.Random(3).sample([case for case in cases_of("shapes") if "seed" not in case], 4)
    cases = [{**case, "generation_mode": mode, "max_new_tokens": 7} for case, mode in zip(plain, modes, strict=True)]
    alone = [answers(model, [case], **options)[0] for case in cases]
    differ, draw = 0, random.Random(compositions)
    for _ in range(compositions):
        chosen = draw.sample(range(len(cases)), draw.randint(2, len(cases)))
        together = answers(model, [cases[row] for row in chosen], max_batch_rows=draw.choice([None, 3]), **options)
        differ += sum(one != alone[row] for row, one in zip(chosen, together, strict=True))
    return differ


def test_values_follow_from_the_row_alone():
    """Widths at which products of one token are summed in another order than those of several."""
    models = [wide_model(torch.float32, 128, 512), wide_model(torch.bfloat16, 1024, 8192)]
    assert sum(rows_that_differ(model, 2) for model in models), "else this tells nothing here"
    for model in models:
        assert rows_that_differ(model, 2, batch_invariant=True) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_on_cuda(dtype, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "WORTH_CAPTURING", 1)
    model = wide_model(dtype, 2048, 11008, "cuda")
    assert rows_that_differ(model, 30), "else this tells nothing here"
    for graphs in (False, True):
        assert rows_that_differ(model, 30, batch_invariant=True, decode_graphs=graphs) == 0
