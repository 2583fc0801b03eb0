"""What each generation mode costs and gives: forwards, agreement with next-token decoding, boxes found, and scores.

    python benchmarks/modes.py [--scenes 200] [--checkpoint demo/checkpoint] [--json FILE]

Scenes are drawn from seeds that the demo's checkpoint has not seen (demo/scenes.py), and each label is asked for in a
question of its own, as a scan asks. For each mode it prints tokens per forward, forwards of slow's, rows identical to
slow's, precision and recall at IoU 0.5, and the AUROC of the boxes' scores: the probability that a correct box scores
higher than a wrong one. Correct is a box that overlaps, IoU ≥ 0.5, a thing of its label.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import DEMO, count, environment, print_json  # noqa: E402
from demo.scenes import Scene, scenes  # noqa: E402
from hub.loading import load  # noqa: E402
from training.validation import overlap  # noqa: E402

MODES: dict[str, dict[str, Any]] = {
    "slow": {"generation_mode": "slow"},
    "verified": {"generation_mode": "verified"},
    "hybrid, labels verified": {"generation_mode": "hybrid", "verify_labels": True},
    "hybrid": {"generation_mode": "hybrid"},
    "fast": {"generation_mode": "fast"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(DEMO), help="trained on such scenes (default demo/checkpoint)")
    parser.add_argument("--scenes", type=count, default=200, help="how many (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="append the record to this file")
    arguments = parser.parse_args()

    model, processor = load(arguments.checkpoint, device="cpu", dtype="float32")
    drawn = asked(arguments.scenes, arguments.seed)
    inputs = inputs_of(processor, drawn)
    record = {"benchmark": "modes", "scenes": arguments.scenes, "seed": arguments.seed, **environment(model.device)}
    print(f"{arguments.scenes} scenes, {len(drawn)} questions, {arguments.checkpoint}, greedy, float32")
    print(f"{record['machine']}, {record['date']}\n")
    print("| mode | tokens a forward | forwards of slow's | rows as slow | precision | recall | AUROC of scores |")
    print("|---|---|---|---|---|---|---|")
    slow = None
    for name, mode in MODES.items():
        output = model.generate(**inputs, **mode, max_new_tokens=256, return_dict_in_generate=True, output_scores=True)
        answers = answers_of(output)
        found = processor.post_process_grounding(output, target_sizes=[(1000, 1000)] * len(drawn))
        forwards = int(output.row_forwards.sum())
        slow = slow or (forwards, answers)
        line = {
            "tokens_a_forward": sum(map(len, answers)) / forwards,
            "forwards_of_slow": forwards / slow[0],
            "rows_as_slow": sum(one == other for one, other in zip(answers, slow[1], strict=True)) / len(answers),
            **quality(found, drawn),
        }
        record[name] = line
        values = (f"{line[key]:.1%}" for key in ("forwards_of_slow", "rows_as_slow", "precision", "recall"))
        print(f"| `{name}` | {line['tokens_a_forward']:.2f} | {' | '.join(values)} | {line['auroc']:.3f} |")
    print_json(record, arguments.json)


def asked(count: int, seed: int) -> list[Scene]:
    """Drawn scenes, each as often as it has labels to ask for, with one of them."""
    return [replace(scene, queries=[query]) for scene in scenes(count, seed) for query in scene.queries]


def inputs_of(processor: Any, drawn: list[Scene]) -> Any:
    """A row for each scene, which asks for its queries."""
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": s.image}, {"type": "text", "text": question}]}]
        for s in drawn
        for question in [processor.build_question("detect", s.queries)]
    ]
    return processor.apply_chat_template(
        talks, add_generation_prompt=True, tokenize=True, padding=True, return_dict=True, return_tensors="pt"
    )


def answers_of(output: Any) -> list[list[int]]:
    new = output.sequences[:, -output.token_log_probs.shape[1] :]
    return [ids[~scores.isnan()].tolist() for ids, scores in zip(new, output.token_log_probs, strict=True)]


def quality(found: list[dict[str, Any]], drawn: list[Scene]) -> dict[str, float]:
    """Precision and recall at IoU 0.5, each thing found once; AUROC of the scores."""
    scores: dict[bool, list[float]] = {True: [], False: []}
    hits = things = 0
    for row, scene in zip(found, drawn, strict=True):
        left = {label: scene.boxes_of(label) for label in scene.queries}
        things += sum(map(len, left.values()))
        for box, label, score in zip(row["boxes"].tolist(), row["labels"], row["scores"].tolist(), strict=True):
            scores[any(overlap(box, truth) >= 0.5 for truth in scene.boxes_of(label))].append(score)
            hit = next((truth for truth in left.get(label, []) if overlap(box, truth) >= 0.5), None)
            if hit is not None:
                left[label].remove(hit)
                hits += 1
    said = len(scores[True]) + len(scores[False])
    return {"precision": hits / max(1, said), "recall": hits / max(1, things), "boxes": said, "auroc": auroc(scores)}


def auroc(scores: dict[bool, list[float]]) -> float:
    right, wrong = torch.tensor(scores[True]), torch.tensor(scores[False])
    higher = (right[:, None] > wrong).double() + 0.5 * (right[:, None] == wrong)
    return float(higher.mean())


if __name__ == "__main__":
    main()
