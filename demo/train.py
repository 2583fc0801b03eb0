"""Trains the demo's checkpoint: a LocateAnything of a million parameters, on scenes that it draws.

    python demo/train.py --out DIR [--steps 20000]        (or: make demo-model)

Everything is seeded; the same command goes on from the state in DIR. The learning rate is constant and falls over the
last fifth. Every `--every` steps the model answers scenes it never trains on; the best so far lies in DIR/best.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, Trainer, TrainerCallback, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.scenes import COLOURS, ELSEWHERE, SHAPES, Scene, absent, scene, scenes  # noqa: E402
from hub.assembly import assemble  # noqa: E402
from training import MTPCollator  # noqa: E402
from training.data import answer_of, thousandths  # noqa: E402
from training.validation import validate  # noqa: E402

TEMPLATE = ROOT / "tests" / "goldens" / "shapes" / "checkpoint"  # of the files beside the weights
TASKS = ("detect", "detect", "detect", "detect", "detect", "ground", "single", "point", "point")
TURNS = 2  # questions on a picture
PATCHES = 100  # of a picture at most: larger ones are made smaller
NONE = "none"  # the template's word for nothing found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo-model", help="default demo-model")
    parser.add_argument("--steps", type=int, default=20_000, help="of 12 pictures (default 20000)")
    parser.add_argument("--every", type=int, default=1000, help="steps between two looks (default 1000)")
    args = parser.parse_args()

    torch.manual_seed(0)
    start, folder = args.out / "start", args.out / "drop-in"
    if not folder.exists():
        begin(start)
        assemble(start, folder)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    hidden = model.config.text_config.hidden_size
    model.head = torch.nn.Linear(hidden, len(COLOURS) + 1 + len(SHAPES) + 1 + 4 * hidden)
    told = {"learning_rate": 2e-3, "adam_beta2": 0.98, "weight_decay": 0.01, "warmup_steps": 100, "report_to": []}
    told |= {"logging_steps": 25, "save_steps": 100, "save_total_limit": 1, "disable_tqdm": True}
    settings = TrainingArguments(
        output_dir=str(args.out / "state"),
        max_steps=args.steps,
        per_device_train_batch_size=12,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": args.steps // 5, "min_lr_ratio": 0.01},
        remove_unused_columns=False,
        **told,
    )
    data, collator = Questions(processor), Collator(processor, none=NONE)
    trainer = Demo(model=model, args=settings, train_dataset=data, data_collator=collator)
    trainer.add_callback(Look(args.out, start, processor, args.every))
    trainer.train(resume_from_checkpoint=any((args.out / "state").glob("checkpoint-*")))


class Demo(Trainer):
    """Asks the picture's tokens too what they show (colour, shape, box), by a head that is thrown away: the network is
    small and has an hour. The data is drawn at random already, and a run of another length then sees the same."""

    def compute_loss(self, model, inputs, return_outputs=False, **told):
        truth, pixels = inputs.pop("truth"), inputs.pop("pixel_values")
        features = model.extract_feature(pixels, inputs.pop("image_grid_hws"))
        tokens = torch.cat(model.project(features))
        colours, shapes, boxes = model.head(tokens).split([len(COLOURS) + 1, len(SHAPES) + 1, 4 * tokens.shape[1]], 1)
        seen = F.cross_entropy(colours, truth[:, 0]) + F.cross_entropy(shapes, truth[:, 1])
        shown = truth[:, 0] > 0
        first = inputs["windows"].marks.coord_start
        places = model.get_input_embeddings().weight[first : first + 1001]
        logits = boxes[shown].unflatten(1, (4, -1)) @ places.T
        seen += F.cross_entropy(logits.flatten(0, 1), truth[shown, 2:].flatten())
        return 0.3 * seen + super().compute_loss(model, {**inputs, "visual_features": features}, **told)

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Collator(MTPCollator):
    def __call__(self, records):
        batch = super().__call__(records)
        sizes = batch["image_grid_hws"].tolist()
        pairs = zip(records, sizes, strict=True)
        return {**batch, "truth": torch.cat([shown(record["scene"], h // 2, w // 2) for record, (h, w) in pairs])}


def shown(drawn: Scene, rows: int, columns: int) -> torch.Tensor:
    """`[rows * columns, 6]`: of the thing that each token shows most of, its colour, shape and box; zeros for none."""
    truth, most = torch.zeros(rows, columns, 6, dtype=torch.long), torch.full((rows, columns), 0.15)
    for label, box in drawn.boxes:
        colour, shape = label.split(" ", 1)
        left, top, right, bottom = (value / 1000 for value in box)
        covered = [
            (torch.arange(1, n + 1).clamp(max=stop * n) - torch.arange(n).clamp(min=start * n)).clamp(min=0)
            for n, start, stop in ((rows, top, bottom), (columns, left, right))
        ]
        share = covered[0][:, None] * covered[1]
        said = [[*COLOURS].index(colour) + 1, [*SHAPES].index(shape) + 1, *thousandths(box, (1000, 1000))]
        truth[share > most] = torch.tensor(said)
        most = torch.maximum(most, share)
    return truth.flatten(0, 1)


class Questions(torch.utils.data.Dataset):
    """Scenes without end, each the same whenever it is asked for, with a conversation about it."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __len__(self) -> int:
        return 10**8

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(10**9 + index)
        drawn = scene(rng)
        talk = [turn for _ in range(TURNS) for turn in ask(drawn, rng, self.processor)]
        return {"image": drawn.image, "conversations": talk, "scene": drawn}


def ask(drawn: Scene, rng: random.Random, processor: Any) -> list[dict[str, str]]:
    """A question about a scene, and its answer."""
    task = rng.choice(TASKS)
    present = sorted({label for label, _ in drawn.boxes})
    queries: list[str] = []
    for _ in range(rng.choice([1, 1, 2, 3]) if task == "detect" else 1):
        kind = rng.random()
        if kind < 0.5 or task == "single":
            label = rng.choice(present)
        elif kind < 0.65:
            label = rng.choice([*SHAPES])
        else:
            label = absent(rng, present)
        if label not in queries:
            queries.append(label)
    return turns(drawn, task, queries, processor)


def turns(drawn: Scene, task: str, queries: list[str], processor: Any) -> list[dict[str, str]]:
    found = [(label, sorted(thousandths(box, (1000, 1000)) for box in drawn.boxes_of(label))) for label in queries]
    if task == "single":
        found = [(label, boxes[:1]) for label, boxes in found]
    if task == "point":
        found = [(None, [[(a + c) // 2, (b + d) // 2] for a, b, c, d in boxes]) for _, boxes in found]
    question, answer = processor.build_question(task, queries), answer_of(found, NONE)
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


class Look(TrainerCallback):
    """Now and then answers scenes that are not trained on, and keeps the best model."""

    def __init__(self, out: Path, start: Path, processor: Any, every: int):
        self.out, self.start, self.processor, self.every = out, start, processor, every
        talks = [(each.image, turns(each, "detect", each.queries, processor)) for each in scenes(100, seed=7)]
        self.records = [{"image": image, "conversations": talk} for image, talk in talks]
        self.log = out / "looks.jsonl"
        told = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        self.best = max((line["verified"]["f1"] for line in told), default=0.0)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        told = validate(model, self.processor, self.records, modes=("verified", "hybrid"))
        with self.log.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **told}) + "\n")
        if told["verified"]["f1"] > self.best:
            self.best, best = told["verified"]["f1"], self.out / "best"
            shutil.copytree(self.start, best, dirs_exist_ok=True)
            weights = {name: each.clone() for name, each in model.state_dict().items() if "head." not in name[:5]}
            save_file(weights, best / "model.safetensors", metadata={"format": "pt"})


# ---- the checkpoint to begin with


def begin(folder: Path) -> None:
    """The goldens' checkpoint, which knows three shapes in small pictures, with more words and a limit of pixels."""
    shutil.copytree(TEMPLATE, folder)
    pixels = folder / "preprocessor_config.json"
    pixels.write_text(json.dumps(json.loads(pixels.read_text()) | {"in_token_limit": PATCHES}, indent=2))
    words = [word for text in (*SHAPES, *ELSEWHERE) for word in text.split()]
    at, more = add_words(folder, [f"{space}{word}" for word in words for space in ("", " ")])
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        part |= {key: id + more for key, id in part.items() if "_token_i" in key and id >= at}
    config["text_config"]["vocab_size"] += more
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = load_file(folder / "model.safetensors")
    old = weights["language_model.model.embed_tokens.weight"]
    torch.manual_seed(0)
    new = torch.cat([old[:at], old[:at].std() * torch.randn(more, old.shape[1]), old[at:]])
    # it has learnt only coordinates on the grids of its scenes; those between begin as a blend of their neighbours
    learnt = sorted({round(1000 * part / cells) for cells in (3, 4, 5) for part in range(cells + 1)})
    for low, high in pairwise(config["coord_start_token_id"] + place for place in learnt):
        new[low : high + 1] = torch.lerp(new[low], new[high], torch.linspace(0, 1, high - low + 1)[:, None])
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"language_model.{name}.weight"] = new.clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_words(folder: Path, words: list[str]) -> tuple[int, int]:
    """Makes a token of each word, behind the vocabulary and before the added tokens; other texts stay as they are.
    Returns the first new id, and how many there are."""
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    vocabulary, merges = told["model"]["vocab"], told["model"]["merges"]
    first = len(vocabulary)
    for word in words:
        spelt, *pieces = Tokenizer.from_str(json.dumps({**told, "added_tokens": []})).encode(word).tokens
        for piece in pieces:
            merges.append([spelt, piece])
            spelt += piece
            vocabulary.setdefault(spelt, len(vocabulary))
    more = len(vocabulary) - first
    for token in told["added_tokens"]:
        token["id"] += more
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = settings["added_tokens_decoder"]
    settings["added_tokens_decoder"] = {str(int(index) + more): token for index, token in added.items()}
    files = {"tokenizer.json": told, "tokenizer_config.json": settings, "vocab.json": vocabulary}
    files["added_tokens.json"] = {token["content"]: token["id"] for token in told["added_tokens"]}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return first, more


if __name__ == "__main__":
    main()
