"""How many answers in half precision equal the float32 answer of the row alone.

    python benchmarks/precision.py [--batch 16]

Rows are the recorded goldens (tests/goldens); float32 answers are the stock model's own. Greedy rows only: a sampled
row in another precision is another draw. Measured, not asserted: in half precision a product's rounding depends on the
batch's shape, and an argmax on a near-tie can flip.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import count  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=count, default=16, help="rows in a batch (default 16)")
    arguments = parser.parse_args()

    from tests.conftest import CHECKPOINTS, Batch, cases_of, model_of

    for name in CHECKPOINTS:
        cases = [case for case in cases_of(name) if "seed" not in case]
        for dtype in (torch.bfloat16, torch.float16):
            model = type(model_of(name)).from_pretrained(CHECKPOINTS[name], dtype=dtype).eval()
            for size in (1, arguments.batch):
                same = 0
                for start in range(0, len(cases), size):
                    batch = Batch(name, cases[start : start + size])
                    batch.model = model
                    width = batch.input_ids.shape[1]
                    for row, case in zip(batch.run().sequences.tolist(), batch.cases, strict=True):
                        ids = case["output_ids"]
                        same += row[width : width + len(ids)] == ids
                rate = 100 * same / len(cases)
                print(f"{name:13} {str(dtype)[6:]:9} batch {size:3}: {same}/{len(cases)} rows identical ({rate:.1f}%)")


if __name__ == "__main__":
    main()
