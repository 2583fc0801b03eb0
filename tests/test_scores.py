"""Scores: of tokens from generate, of boxes, points and labels from the processor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation import GenerateDecoderOnlyOutput

from locateanything.grounding import geometric_mean, parse_places
from locateanything.processing import LocateAnythingImageProcessor, LocateAnythingProcessor
from tests.conftest import CHECKPOINTS, Batch, cases_of, tokenizer_of
from tests.stand_in import LocateAnythingForConditionalGeneration as StandIn


def processor_of(name: str) -> LocateAnythingProcessor:
    return LocateAnythingProcessor(LocateAnythingImageProcessor.from_pretrained(CHECKPOINTS[name]), tokenizer_of(name))


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
    """The first window, by a dense pass over prompt and window that is written from decoding.md alone."""
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


# ---- boxes


def test_boxes_are_found_as_without_scores(golden):
    processor = processor_of(golden)
    batch = mixed(golden)
    output = batch.run(output_scores=True)
    sizes = [(300, 400)] * len(batch.cases)
    plain = processor.post_process_grounding(output.sequences[:, batch.input_ids.shape[1] :], sizes)
    scored = processor.post_process_grounding(output, sizes)
    assert sum(len(row["labels"]) for row in scored) > 3
    for with_scores, without in zip(scored, plain, strict=True):
        for name, value in without.items():
            assert (torch.equal if isinstance(value, torch.Tensor) else list.__eq__)(with_scores[name], value)
        for kind, prefix in (("boxes", ""), ("points", "point_")):
            for name in (f"{prefix}scores", f"{prefix}label_scores"):
                assert with_scores[name].shape == (len(with_scores[kind]),)
                assert ((with_scores[name] >= 0) & (with_scores[name] <= 1)).all()


def test_a_score_is_the_geometric_mean_of_the_coordinates():
    processor, case = processor_of("shapes"), next(c for c in cases_of("shapes") if c["num_boxes"] == 2)
    batch = Batch("shapes", [case])
    output = batch.run(output_scores=True)
    (row,) = processor.post_process_grounding(output)
    roles = batch.model.config.token_roles
    new, scores = case["output_ids"], output.token_log_probs[0].exp().tolist()
    boxes = [at for at, token in enumerate(new) if token == roles.box_start and new[at + 1] != roles.none]
    expected = [math.prod(scores[at + 1 : at + 5]) ** 0.25 for at in boxes]
    assert row["scores"].tolist() == pytest.approx(expected, rel=1e-4)
    opens, closes = new.index(roles.ref_start), new.index(roles.ref_end)
    label = math.prod(scores[opens + 1 : closes]) ** (1 / (closes - opens - 1))
    assert row["label_scores"][0] == pytest.approx(label, rel=1e-4)


def test_a_threshold_leaves_out_what_scores_lower(golden):
    processor, batch = processor_of(golden), mixed(golden)
    output = batch.run(output_scores=True)
    everything = processor.post_process_grounding(output)
    half = sorted(score for row in everything for score in row["scores"].tolist())
    threshold = np.float32(half[len(half) // 2])
    for row, kept in zip(everything, processor.post_process_grounding(output, threshold=threshold), strict=True):
        high = row["scores"] >= threshold
        assert torch.equal(kept["boxes"], row["boxes"][high]) and torch.equal(kept["scores"], row["scores"][high])
        assert kept["labels"] == [label for label, own in zip(row["labels"], high.tolist(), strict=True) if own]
    nothing = processor.post_process_grounding(output, threshold=1.0)
    assert all((row["scores"] == 1).all() for row in nothing)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, "high", True])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(ValueError, match="threshold: got"):
        processor_of("shapes").post_process_grounding(["none"], threshold=threshold)


def test_a_threshold_needs_scores():
    batch = Batch("shapes", cases_of("shapes")[:2])
    transformers_own = GenerateDecoderOnlyOutput(sequences=batch.input_ids, scores=(torch.zeros(2, 9),))
    assert len(processor_of("shapes").post_process_grounding(transformers_own)) == 2
    for outputs in (["<box><1><2></box>"], batch.run(), transformers_own):
        with pytest.raises(ValueError, match=r"outputs without scores.*output_scores=True"):
            processor_of("shapes").post_process_grounding(outputs, threshold=0.5)


def test_labels_of_several_bytes_a_letter_are_whole():
    processor = processor_of("shapes")
    text = "<ref>gr\u00fcner 圆</ref><box><1><2><3><4></box><|im_end|>"
    ids = processor.tokenizer.encode(text)

    class Output:
        sequences = torch.tensor([[5, 5, *ids]])
        token_log_probs = torch.full((1, len(ids)), math.log(0.5))

    (row,) = processor.post_process_grounding(Output)
    assert row["labels"] == ["gr\u00fcner 圆"]
    assert row["scores"].tolist() == pytest.approx([0.5]) and row["label_scores"].tolist() == pytest.approx([0.5])


def test_places_of_groundings():
    text = "ab<ref>cat</ref><box><1><2><3><4></box><box><5><6></box>"
    (first, label, box), (second, same, point) = parse_places(text)
    assert (text[label.start : label.stop], text[box.start : box.stop]) == ("cat", "<box><1><2><3><4></box>")
    assert same == label and text[point.start : point.stop] == "<box><5><6></box>"
    assert (first.coordinates, second.coordinates) == ((1, 2, 3, 4), (5, 6))
    (unnamed,) = parse_places("<box><1><2></box>")
    assert not unnamed[1]


def test_the_mean_of_nothing_is_one():
    assert geometric_mean([]) == 1.0
    assert geometric_mean([math.log(0.25), 0.0]) == pytest.approx(0.5)
    assert geometric_mean([-math.inf, 0.0]) == 0.0
    assert geometric_mean([1e-9]) == 1.0
