"""How the answers in half precision, and by int8 products, agree with the float32 answers.

    python benchmarks/precision.py [--batch 16] [--scenes 200] [--json FILE]

First the recorded goldens (tests/goldens), whose float32 answers are the stock model's own: rows identical. Greedy
rows only: a sampled row in another precision is another draw. Then scenes that the demo's checkpoint has not seen,
asked as in modes.py: rows identical to float32's here, the mean IoU of each float32 box and the best of its label
here, and precision and recall of the boxes at IoU 0.5. Measured, not asserted: an argmax on a near-tie can flip, and
in half precision a product's rounding depends on the batch's shape; int8 rows (hub/loading.py) do not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import DEMO, count, environment, print_json  # noqa: E402
from benchmarks.modes import answers_of, asked, inputs_of, quality  # noqa: E402
from hub.loading import load  # noqa: E402
from training.validation import overlap  # noqa: E402

FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int8, bfloat16": {"dtype": "bfloat16", "quantize": "int8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=count, default=16, help="rows in a batch (default 16)")
    parser.add_argument("--scenes", type=count, default=200, help="how many (default 200)")
    parser.add_argument("--json", help="append the record to this file")
    arguments = parser.parse_args()

    from tests.conftest import CHECKPOINTS, Batch, cases_of

    record: dict[str, Any] = {"benchmark": "precision", **environment(torch.device("cpu")), "batch": arguments.batch}
    for name, checkpoint in CHECKPOINTS.items():
        cases = [case for case in cases_of(name) if "seed" not in case]
        for form, options in FORMS.items():
            model, processor = load(str(checkpoint), device="cpu", **options)
            for size in (1, arguments.batch):
                same = 0
                for start in range(0, len(cases), size):
                    batch = Batch(name, cases[start : start + size])
                    batch.model = model
                    width = batch.input_ids.shape[1]
                    for row, case in zip(batch.run().sequences.tolist(), batch.cases, strict=True):
                        ids = case["output_ids"]
                        same += row[width : width + len(ids)] == ids
                record[f"{name}, {form}, {size}"] = [same, len(cases)]
                print(f"{name:13} {form:14} batch {size:3}: {same}/{len(cases)} rows identical", flush=True)
    print(f"\n{arguments.scenes} scenes\n| form | rows as float32 | IoU of boxes | precision | recall |")
    print("|---|---|---|---|---|")
    drawn = asked(arguments.scenes, 0)
    exact: tuple[list, list] | None = None
    for form, options in FORMS.items():
        model, processor = load(str(DEMO), device="cpu", **options)
        inputs = inputs_of(processor, drawn)
        output = model.generate(**inputs, max_new_tokens=256, return_dict_in_generate=True, output_scores=True)
        answers = answers_of(output)
        found = processor.post_process_grounding(output, target_sizes=[(1000, 1000)] * len(drawn))
        exact = exact or (answers, found)
        line = {
            "rows": sum(one == other for one, other in zip(answers, exact[0], strict=True)) / len(answers),
            "iou": agreement(exact[1], found),
            **quality(found, drawn),
        }
        record[f"scenes, {form}"] = line
        print(f"| {form} | {line['rows']:.1%} | {line['iou']:.3f} | {line['precision']:.1%} | {line['recall']:.1%} |")
    print_json(record, arguments.json)


def agreement(exact: list[dict[str, Any]], found: list[dict[str, Any]]) -> float:
    """Mean IoU of each box of `exact` and the best of its label in `found`, 0 where there is none."""
    ious = []
    for wanted, row in zip(exact, found, strict=True):
        others = [*zip(row["labels"], row["boxes"].tolist(), strict=True)]
        for label, box in zip(wanted["labels"], wanted["boxes"].tolist(), strict=True):
            ious.append(max((overlap(box, other) for name, other in others if name == label), default=0.0))
    return sum(ious) / len(ious)


if __name__ == "__main__":
    main()
