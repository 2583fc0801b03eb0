"""Trains the demo's checkpoint: a LocateAnything of 1.5 million parameters, on scenes that it draws.

    python demo/train.py --out DIR        (or: make demo-model)

First the vision tower learns alone to tell what pictures show, by a head that is thrown away; then the whole model
learns to answer, by the windows' objective (docs/finetuning.md). Everything is seeded, and the same command goes on
from the state in DIR. Every `--every` steps the model answers 100 scenes; the best so far lies in DIR/best, and
`python benchmarks/modes.py --checkpoint DIR/best` judges it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.scenes import COLOURS, ELSEWHERE, SHAPES, Scene, absent, scene, scenes  # noqa: E402
from hub.assembly import assemble  # noqa: E402
from training import MTPCollator  # noqa: E402
from training.data import answer_of, thousandths  # noqa: E402
from training.validation import validate  # noqa: E402

TEMPLATE = ROOT / "tests" / "goldens" / "shapes" / "checkpoint"  # of the files beside the weights
TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
GRID = 12  # rows and columns of the tower's positions; larger pictures are shrunk to as many patches
NONE = "none"  # the template's word for nothing found
TASKS = ("detect", "detect", "detect", "detect", "detect", "ground", "single", "point")
TURNS = 3  # questions on a picture
LOOKED_AT, ANSWERED = 32, 12  # pictures a step, of the tower alone and of the whole
ANSWERING_PACE = 1 / 3  # of the learning rate, as the whole stands less of it
PARTS = [len(COLOURS) + 1, len(SHAPES) + 1]  # classes of the head, 0 for none
Batch = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo-model", help="default demo-model")
    parser.add_argument("--looking", type=int, default=1200, help="steps of the tower alone (default 1200)")
    parser.add_argument("--answering", type=int, default=6000, help="steps of the whole (default 6000)")
    parser.add_argument("--every", type=int, default=1000, help="steps between two looks (default 1000)")
    args = parser.parse_args()
    start, folder, state = args.out / "start", args.out / "drop-in", args.out / "state.pt"
    if not folder.exists():
        begin(start)
        assemble(start, folder)
    torch.manual_seed(0)
    processor, model = AutoProcessor.from_pretrained(folder, trust_remote_code=True), fresh(folder)
    head = nn.Linear(model.config.text_config.hidden_size, sum(PARTS) + 4 * model.config.text_config.hidden_size)
    optimizers = optimizers_of(model, head)
    kept = {"model": model, "head": head, **{type(each).__name__: each for each in optimizers}}
    done = 0
    if state.exists():
        told = torch.load(state)
        done = told.pop("step")
        for name, each in told.items():
            kept[name].load_state_dict(each)
    look = Look(args.out, start, processor)
    pictures = [[(LOOKED_AT * step + i, False) for i in range(LOOKED_AT)] for step in range(args.looking)]
    pictures += [[(10**9 + ANSWERED * step + i, True) for i in range(ANSWERED)] for step in range(args.answering)]
    data, collator = Drawn(processor), Collator(processor, none=NONE)
    loader = DataLoader(data, batch_sampler=pictures[done:], collate_fn=collator, num_workers=1, prefetch_factor=4)
    losses, began = [], time.perf_counter()
    for step, batch in enumerate(loader, done + 1):
        part = (step, args.looking) if step <= args.looking else (step - args.looking, args.answering)
        loss = loss_of(model, head, batch, late=step > args.looking + args.answering // 2)
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = group["most"] * pace(*part) * (1 if step <= args.looking else ANSWERING_PACE)
            each.step()
            each.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            seconds, began = time.perf_counter() - began, time.perf_counter()
            print(f"step {step} of {len(pictures)}: loss {sum(losses) / len(losses):.3f}, {seconds:.0f} s", flush=True)
            losses.clear()
        if step % args.every == 0 or step == len(pictures):
            if step > args.looking:
                look(model, step)
            told = {"step": step, **{name: each.state_dict() for name, each in kept.items()}}
            torch.save(told, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)


def fresh(folder: Path) -> Any:
    """The model of a folder, with weights to begin with that suit a narrow network."""
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)
    model = model.float().train()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and "lm_head" not in name:
            adds = name.endswith(("wo", "fc1", "o_proj", "down_proj"))  # to what goes around it
            nn.init.normal_(module.weight, std=(0.5 if adds else 1) * module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    words, first = model.get_input_embeddings().weight, model.config.coord_start_token_id
    nn.init.normal_(model.vision_model.patch_embed.pos_emb.weight, std=0.1)
    nn.init.normal_(words, std=0.3)
    with torch.no_grad():  # near places are alike
        some = 0.3 * torch.randn(1, words.shape[1], 51)
        words[first : first + 1001] = F.interpolate(some, 1001, mode="linear", align_corners=True)[0].T
    return model


def optimizers_of(model: Any, head: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learn faster by it, and AdamW for the rest."""
    layers = ("vision_model.encoder.blocks", "mlp1", "language_model.model.layers")
    matrices = [each for name, each in model.named_parameters() if each.dim() == 2 and name.startswith(layers)]
    known = set(matrices)
    others = [each for each in (*model.parameters(), *head.parameters()) if each not in known]
    told = [
        torch.optim.Muon(matrices, lr=0.015, weight_decay=0.01),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for group in (group for each in told for group in each.param_groups):
        group["most"] = group["lr"]
    return told


def pace(step: int, steps: int) -> float:
    """Of the learning rate at a part's step: it rises at first, and falls over the last third."""
    return min(1.0, step / 100, max(0.01, 3 * (steps - step) / steps))


def loss_of(model: Any, head: nn.Module, batch: Batch, late: bool = False) -> torch.Tensor:
    """What the tower's tokens show (colour, shape and box) as the head tells it, and the answers if any are asked.
    late: the answers are learnt by and large."""
    truth = batch.pop("truth")
    features = model.extract_feature(batch.pop("pixel_values"), batch.pop("image_grid_hws"))
    told = head(torch.cat(model.project(features)))
    colours, shapes, boxes = told.split([*PARTS, told.shape[1] - sum(PARTS)], 1)
    shown, first = truth[:, 0] > 0, model.config.coord_start_token_id
    places = boxes[shown].unflatten(1, (4, -1)) @ model.get_input_embeddings().weight[first : first + 1001].T
    loss = F.cross_entropy(colours, truth[:, 0]) + F.cross_entropy(shapes, truth[:, 1])
    loss = loss + F.cross_entropy(places.flatten(0, 1), truth[shown, 2:].flatten())
    if not batch:
        return loss
    decoder, kept = model.language_model.model, dict[str, torch.Tensor]()
    hooks = [
        decoder.layers[2].register_forward_pre_hook(lambda _, args: kept.update(layer=args[0])),
        decoder.norm.register_forward_hook(lambda _, args, told: kept.update(last=told)),
    ]
    loss = 0.2 * loss + model(**batch, visual_features=features).loss
    for hook in hooks:
        hook.remove()
    loss = loss + astray(model, decoder.layers[2], kept["layer"], batch, truth)
    return loss + crowding(model, kept["last"], batch) if late else loss


def crowding(model: Any, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """How far coordinates stand above the sixth of the other tokens in those slots of windows that are none.

    The stock reads a window as a box where each of its slots 1 to 4 has a coordinate among its four most probable
    tokens, however small that probability is (docs/stock-behaviour.md, 3): one that says the end with certainty too.
    hidden: the decoder's last.
    """
    labels, first = batch["labels"][0], model.config.coord_start_token_id
    asked = (batch["windows"].places[1] >= 0) & ((labels < first) | (labels > first + 1000))
    before, coordinates, behind = model.get_output_embeddings()(hidden[0, asked]).tensor_split(
        (first, first + 1001), 1
    )
    others = torch.cat([before, behind], 1).topk(6).values[:, -1]
    return F.relu(coordinates.amax(1) - others + 1).mean()


def astray(model: Any, layer: nn.Module, hidden: torch.Tensor, batch: Batch, truth: torch.Tensor) -> torch.Tensor:
    """How far the first head of a layer of the decoder is from looking, where a box begins to be said, at the tokens
    that show its thing and at no others of its picture.

    By the answers alone, and at three times the learning rate, the decoder had not found out in 2,500 steps what a
    question and a picture have to do with each other. hidden: the layer's input.
    """
    asking, image, mine, shows = targets_of(batch, truth, model)
    attention, hidden = layer.self_attn, layer.input_layernorm(hidden)
    turned = apply_rotary_pos_emb(
        attention.q_proj(hidden)[..., None, : attention.head_dim],
        attention.k_proj(hidden)[..., None, : attention.head_dim],
        *model.language_model.model.rotary_emb(hidden, batch["position_ids"]),
        unsqueeze_dim=2,
    )
    query, key = (each[0, places, 0] for each, places in zip(turned, (asking, image), strict=True))
    scores = (query @ key.T * attention.scaling).masked_fill(~mine, -torch.inf)
    right = scores.masked_fill(~shows, -torch.inf)
    return (scores.logsumexp(1) - right.logsumexp(1)).mean()


def targets_of(batch: Batch, truth: torch.Tensor, model: Any) -> tuple[torch.Tensor, ...]:
    """Where a box begins to be said, and where the pictures' tokens are; `[boxes, tokens]` bool, whether a token is of
    that box's picture, and whether it shows its thing. Boxes of things that no token shows are left out."""
    ids, labels, first = batch["input_ids"][0], batch["labels"][0], model.config.coord_start_token_id
    coordinate = (labels >= first) & (labels <= first + 1000)
    begins = coordinate & ~coordinate.roll(1)
    for step in range(1, 4):  # and a point does not
        begins &= coordinate.roll(-step)
    asking, image = begins.nonzero()[:, 0], (ids == model.image_token_index).nonzero()[:, 0]
    boxes = labels[asking[:, None] + torch.arange(4)] - first
    sample = batch["windows"].places[0]
    mine = sample[asking][:, None] == sample[image]
    shows = mine & (truth[:, 0] > 0) & (boxes[:, None] == truth[:, 2:]).all(-1)
    known = shows.any(1)
    return asking[known], image, mine[known], shows[known]


class Collator(MTPCollator):
    """Of pictures with conversations, or without."""

    def __call__(self, records: Sequence[Any]) -> Batch:
        if "conversations" in records[0]:
            batch = super().__call__(records)
        else:
            batch = dict(self.processor.image_processor([each["image"] for each in records], return_tensors="pt"))
        pairs = zip(records, batch["image_grid_hws"].tolist(), strict=True)
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


class Drawn(Dataset):
    """Scenes without end, each the same whenever it is asked for; with a conversation about it, if that is asked."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __getitem__(self, index: tuple[int, bool]) -> dict[str, Any]:
        rng = random.Random(10**9 + index[0])
        drawn = scene(rng)
        record = {"image": drawn.image, "scene": drawn}
        if index[1]:
            record["conversations"] = [turn for _ in range(TURNS) for turn in ask(drawn, rng, self.processor)]
        return record


def ask(drawn: Scene, rng: random.Random, processor: Any) -> list[dict[str, str]]:
    """A question about a scene, and its answer."""
    task = rng.choice(TASKS)
    present = sorted({label for label, _ in drawn.boxes})
    queries: list[str] = []
    for _ in range(rng.choice([1, 1, 1, 2, 3]) if task == "detect" else 1):
        kind = rng.random()
        if kind < 0.65 or task == "single":
            label = rng.choice(present)
        elif kind < 0.7:
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


def questions(processor: Any, drawn: Iterable[Scene]) -> list[dict[str, Any]]:
    """What scenes ask for, each label in a question of its own, as a scan asks."""
    pairs = [(each, query) for each in drawn for query in each.queries]
    return [{"image": s.image, "conversations": turns(s, "detect", [query], processor)} for s, query in pairs]


class Look:
    """Answers scenes that are not trained on, and keeps the best model."""

    def __init__(self, out: Path, start: Path, processor: Any):
        self.out, self.start, self.processor, self.log = out, start, processor, out / "looks.jsonl"
        self.records = questions(processor, scenes(100, seed=7))
        told = [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
        self.best = max((line["hybrid"]["f1"] for line in told), default=0.0)

    def __call__(self, model: Any, step: int) -> None:
        told = validate(model, self.processor, self.records, modes=("verified", "hybrid"))
        with self.log.open("a") as file:
            file.write(json.dumps({"step": step, **told}) + "\n")
        if told["hybrid"]["f1"] > self.best:
            self.best, best = told["hybrid"]["f1"], self.out / "best"
            shutil.copytree(self.start, best, dirs_exist_ok=True)
            weights = {name: each.clone() for name, each in model.state_dict().items()}
            save_file(weights, best / "model.safetensors", metadata={"format": "pt"})


# ---- the checkpoint to begin with


def begin(folder: Path) -> None:
    """The files of the goldens' checkpoint, with more words, a wider tower, a limit of pixels, and no weights yet."""
    shutil.copytree(TEMPLATE, folder)
    pixels = folder / "preprocessor_config.json"
    pixels.write_text(json.dumps(json.loads(pixels.read_text()) | {"in_token_limit": GRID * GRID}, indent=2))
    words = [word for text in (*SHAPES, *ELSEWHERE) for word in text.split()]
    at, more = add_words(folder, [f"{space}{word}" for word in words for space in ("", " ")])
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        part |= {key: id + more for key, id in part.items() if "_token_i" in key and id >= at}
    config["text_config"]["vocab_size"] += more
    config["vision_config"] |= {**TOWER, "init_pos_emb_height": GRID, "init_pos_emb_width": GRID}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({}, folder / "model.safetensors", metadata={"format": "pt"})


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
