"""Scores: of tokens from generate, of boxes, points and labels from the processor."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import CHECKPOINTS, Batch, cases_of
from tests.stand_in import LocateAnythingForConditionalGeneration as StandIn


def mixed(name: str, modes=("hybrid", "fast", "slow", "verified")) -> Batch:
    """Twelve prompts in all modes, some penalised, some sampled with generators of their own."""
    prompts = list({case["case"]: case for case in cases_of(name)}.values())[:12]
    cases = [
        {
            "input_ids": case["input_ids"],
            "images": case["images"],
            "generation_mode": modes[index % len(modes)],
            "max_new_tokens": 40,
            "repetition_penalty": 1.1 if index % 3 == 0 else 1.0,
            "temperature": 0.8 if index % 5 == 0 else 0.0,
            "verify_labels": index % 2 == 0,
            "seed": index,
        }
        for index, case in enumerate(prompts)
    ]
    return Batch(name, cases)


def answer_of(batch: Batch, output, row: int) -> list[int]:
    length = int((~output.token_log_probs[row].isnan()).sum())
    return output.sequences[row, batch.input_ids.shape[1] :][:length].tolist()


@pytest.mark.parametrize("mode", ["slow", "verified"])
def test_next_tokens_score_what_a_plain_forward_gives_them(golden, mode):
    prompts = list({case["case"]: case for case in cases_of(golden)}.values())[:10]
    for case in prompts:
        batch = Batch(golden, [{"input_ids": case["input_ids"], "images": case["images"], "generation_mode": mode,
                                "max_new_tokens": 40}])  # fmt: skip
        output = batch.run(output_scores=True)
        sequence = output.sequences
        with torch.no_grad():
            logits = batch.model(**{**batch.inputs, "input_ids": sequence, "attention_mask": None}).logits
        new = sequence.shape[1] - batch.input_ids.shape[1]
        expected = logits[0, -new - 1 : -1].log_softmax(-1).gather(-1, sequence[0, -new:, None]).squeeze(-1)
        torch.testing.assert_close(output.token_log_probs[0], expected, atol=2e-4, rtol=1e-4)
        assert output.accepted_by.unique().tolist() == [1 if mode == "slow" else 2]


def test_a_windows_tokens_score_what_the_window_gives_them(golden):
    """The first window, by a dense pass over prompt and window that is written from docs/stock-behaviour.md alone."""
    stock = StandIn.from_pretrained(CHECKPOINTS[golden]).eval()
    prompts = list({case["case"]: case for case in cases_of(golden)}.values())[:10]
    for case in prompts:
        batch = Batch(golden, [{"input_ids": case["input_ids"], "images": case["images"], "generation_mode": "fast",
                                "max_new_tokens": 1}])  # fmt: skip
        output = batch.run(output_scores=True)
        features = batch.model.get_image_features(batch.inputs["pixel_values"], batch.inputs["image_grid_hws"])
        with torch.no_grad():
            roles = batch.model.config.token_roles
            logits = stock.logits_of(case["input_ids"], torch.cat(features), roles, windowed=True)
        new = answer_of(batch, output, 0)
        expected = logits[: len(new)].log_softmax(-1).gather(-1, torch.tensor(new)[:, None]).squeeze(-1)
        torch.testing.assert_close(output.token_log_probs[0, : len(new)], expected, atol=2e-4, rtol=1e-4)
        assert output.accepted_by.unique().tolist() == [0]


def test_scores_of_a_row_do_not_depend_on_its_batch(golden):
    batch = mixed(golden)
    together = batch.run(output_scores=True, max_batch_rows=5)
    for row, case in enumerate(batch.cases):
        lone = Batch(golden, [case])
        alone = lone.run(output_scores=True)
        new = answer_of(lone, alone, 0)
        assert answer_of(batch, together, row) == new
        torch.testing.assert_close(
            together.token_log_probs[row, : len(new)], alone.token_log_probs[0], atol=2e-4, rtol=1e-4
        )
        assert together.token_log_probs[row, len(new) :].isnan().all()
        assert together.accepted_by[row, : len(new)].tolist() == alone.accepted_by[0].tolist()
        assert (together.accepted_by[row, len(new) :] == -1).all()
    assert together.token_log_probs[~together.token_log_probs.isnan()].max() <= 1e-6


def test_modes_of_tokens_are_told():
    case = next(case for case in cases_of("shapes") if case["generation_mode"] == "hybrid" and case["switch_to_ar"])
    output = Batch("shapes", [case]).run(output_scores=True)
    by = output.accepted_by[0].tolist()
    assert set(by) == {0, 1} and len(by) == case["num_tokens"]


def test_asking_for_scores_changes_no_answer(golden):
    cases = cases_of(golden)[::5]
    batch = Batch(golden, cases)
    output = batch.run(output_scores=True)
    assert batch.answers(output) == batch.expected()
    assert batch.run().token_log_probs is None
    plain = batch.run(output_scores=True, return_dict_in_generate=False)
    assert torch.equal(plain, output.sequences)
