"""What fine-tuning does to each mode: next-token loss against the windows' own objective, on one new task.

    python benchmarks/finetuning.py [--steps 200] [--json FILE]

The demo's checkpoint, which finds coloured shapes, learns what houses, trees, bottles and cars look like: by LoRA and
either loss, from the same start on the same data. For each it answers pictures it has not seen in all modes, and
prints precision, recall and false boxes, and the CPU seconds a step took.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModel, AutoProcessor, Trainer, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import DEMO, count, environment, print_json  # noqa: E402
from finetune import LINEARS, PROJECTOR  # noqa: E402
from hub.assembly import assemble  # noqa: E402
from training import MTPCollator  # noqa: E402
from training.data import answer_of, thousandths  # noqa: E402
from training.validation import MODES, validate  # noqa: E402

BROWN, WHITE, BLACK = (120, 80, 40), (250, 250, 250), (20, 20, 20)
# Of each thing its parts: how PIL draws it, the corners in fractions of its box, the colour
THINGS: dict[str, list[tuple[str, list[tuple[float, float]], tuple[int, int, int]]]] = {
    "house": [
        ("polygon", [(0, 0.4), (0.5, 0), (1, 0.4)], BROWN),
        ("rectangle", [(0.1, 0.4), (0.9, 1)], WHITE),
        ("rectangle", [(0.4, 0.65), (0.6, 1)], BLACK),
    ],
    "tree": [("rectangle", [(0.4, 0.5), (0.6, 1)], BROWN), ("ellipse", [(0, 0), (1, 0.7)], (20, 110, 40))],
    "bottle": [("rectangle", [(0.4, 0), (0.6, 0.4)], BLACK), ("rectangle", [(0.2, 0.3), (0.8, 1)], (60, 160, 170))],
    "car": [
        ("rectangle", [(0, 0.3), (1, 0.8)], (90, 90, 100)),
        ("ellipse", [(0.1, 0.6), (0.4, 1)], BLACK),
        ("ellipse", [(0.6, 0.6), (0.9, 1)], BLACK),
    ],
}


def records(number: int, seed: int, processor: Any, none: str) -> list[dict[str, Any]]:
    """Pictures of up to five things, each asked for one that is there and, at times, one that is not."""
    rng = random.Random(seed)
    made = []
    for _ in range(number):
        cells = rng.choice([3, 4, 5])
        side = 28 * cells
        noise = np.random.default_rng(rng.randrange(1 << 32)).integers(-9, 10, (side, side, 3))
        image = Image.fromarray((rng.choice([170, 200, 230]) + noise).clip(0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        boxes: dict[str, list[list[int]]] = {}
        kinds = rng.sample([*THINGS], rng.choice([1, 2, 3]))
        for place in rng.sample(range(cells * cells), rng.randint(1, 5)):
            size, kind = side / cells, rng.choice(kinds)
            x, y = place % cells * size, place // cells * size
            boxes.setdefault(kind, []).append(thousandths((x, y, x + size, y + size), (side, side)))
            for how, corners, colour in THINGS[kind]:
                getattr(pen, how)([(x + a * (size - 1), y + b * (size - 1)) for a, b in corners], fill=colour)
        absent = [kind for kind in THINGS if kind not in boxes]
        asked = rng.sample([*boxes], 1) + (rng.sample(absent, 1) if absent and rng.random() < 0.4 else [])
        rng.shuffle(asked)
        answer = answer_of([(label, boxes.get(label, [])) for label in asked], none)
        question = processor.build_question("detect", asked)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        made.append({"image": image, "conversations": turns})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(DEMO), help="one of demo/train.py's (default demo/checkpoint)")
    parser.add_argument("--steps", type=count, default=200, help="of 8 pictures (default 200)")
    parser.add_argument("--pictures", type=count, default=400, help="to learn from (default 400)")
    parser.add_argument("--held", type=count, default=100, help="to judge by (default 100)")
    parser.add_argument("--rank", type=count, default=16, help="of the adapters (default 16)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", help="append the record to this file")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = assemble(arguments.checkpoint, Path(scratch) / "drop-in")
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        none = processor.tokenizer.decode([config.none_token_id])
        train, held = (
            records(n, seed, processor, none) for seed, n in enumerate((arguments.pictures, arguments.held))
        )
        record = {"benchmark": "finetuning", **vars(arguments), **environment(torch.device("cpu"))}
        print(f"LoRA of rank {arguments.rank}, {arguments.steps} steps of 8 pictures, {arguments.held} held out")
        print("\n| loss | seconds a step | mode | precision | recall | F1 | false boxes | forwards an answer |")
        print("|---|---|---|---|---|---|---|---|")
        for name in ("none (before)", "next token", "with windows"):
            torch.manual_seed(0)
            model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
            seconds = 0.0
            if name != "none (before)":
                model = get_peft_model(
                    model,
                    LoraConfig(
                        r=arguments.rank,
                        lora_alpha=2 * arguments.rank,
                        target_modules=LINEARS,
                        modules_to_save=PROJECTOR,
                        task_type="CAUSAL_LM",
                    ),
                )
                settings = TrainingArguments(
                    output_dir=str(Path(scratch) / "state"),
                    max_steps=arguments.steps,
                    per_device_train_batch_size=8,
                    learning_rate=arguments.lr,
                    lr_scheduler_type="cosine",
                    warmup_steps=10,
                    remove_unused_columns=False,
                    save_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                    seed=0,
                )
                collator = MTPCollator(processor, none=none, windows=name == "with windows")
                started = time.process_time()
                Trainer(model=model, args=settings, train_dataset=train, data_collator=collator).train()
                seconds = (time.process_time() - started) / arguments.steps
            told = validate(model, processor, held, limit=128)
            record[name] = {"seconds": seconds, **told}
            for mode in MODES:
                line = told[mode]
                wrong = round(line["said"] * (1 - line["precision"]))
                shares = " | ".join(f"{line[key]:.1%}" for key in ("precision", "recall", "f1"))
                print(
                    f"| {name} | {seconds:.2f} | `{mode}` | {shares} | {wrong} | {line['forwards']:.1f} |", flush=True
                )
    print_json(record, arguments.json)


if __name__ == "__main__":
    main()
