# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a LocateAnything on pictures of yours, so that every mode learns: docs/finetuning.md.

    python finetune.py --model nvidia/LocateAnything-3B --train boxes.json --out tuned
    accelerate launch finetune.py …                                            # on several devices

DIR/model is the result, in the official format: the base's files with new weights, adapters merged. The same command
goes on where it was stopped.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

METHODS = ("lora", "full")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTOR = ["mlp1.0", "mlp1.1", "mlp1.3"]


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.lora = args.method == "lora"
    if args.lora and find_spec("peft") is None:
        sys.exit("--method lora needs peft: pip install --group train")

    import torch
    from transformers import TrainingArguments, set_seed

    from hub.assembly import open_base
    from hub.errors import explain
    from hub.loading import ModelError, load
    from training import MTPCollator

    set_seed(args.seed)
    try:
        base = open_base(args.model)
        # the devices are accelerate's to choose
        model, processor = load(args.model, device="cpu", dtype=args.dtype or ("auto" if args.lora else "float32"))
    except Exception as error:
        if (line := explain(error) or (str(error) if isinstance(error, ModelError) else None)) is None:
            raise
        sys.exit(line)
    processor.image_processor.upright = True
    none = processor.tokenizer.decode([model.config.none_token_id]).strip()
    collator = MTPCollator(processor, max_length=args.max_length, none=none, flex=args.flex)
    train, held = (gather(sources, args, collator) for sources in (args.train, args.validate))
    if not train:
        sys.exit("--train: no record is left to train on")

    model = prepared(model, args)
    cuda = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(args.out / "checkpoints"),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        num_train_epochs=args.epochs,
        max_steps=args.steps or -1,
        learning_rate=args.lr or (1e-4 if args.lora else 2e-5),
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup,
        weight_decay=0.01,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        logging_steps=args.log_every,
        eval_strategy="steps" if held else "no",
        eval_steps=args.every,
        save_steps=args.every,
        save_total_limit=2,
        load_best_model_at_end=bool(held),
        metric_for_best_model=f"eval_{args.best}_f1" if held else None,
        dataloader_num_workers=args.workers,
        remove_unused_columns=False,
        report_to=[],
        seed=args.seed,
    )
    tuner = tuner_class()(
        model=model, args=settings, train_dataset=train, eval_dataset=held or None, data_collator=collator
    )
    tuner.processor, tuner.modes = processor, args.modes
    if held and not args.no_first_look:
        tuner.evaluate()
    tuner.train(resume_from_checkpoint=any((args.out / "checkpoints").glob("checkpoint-*")))
    if tuner.is_world_process_zero():
        export(tuner.accelerator.unwrap_model(tuner.model), base.folder, args.out / "model")
        print(f"{args.out / 'model'}: the fine-tuned model")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id")
    add(
        "--train",
        nargs="+",
        required=True,
        metavar="DATA",
        help="JSON lines, recipe, COCO, data.yaml, or a scan's folder",
    )
    add("--validate", nargs="+", default=[], metavar="DATA", help="to answer now and then, as --train")
    add("--out", type=Path, required=True, metavar="DIR")
    add(
        "--method",
        choices=METHODS,
        default="lora",
        help="adapters on the language model, or all weights (%(default)s)",
    )
    add("--rank", type=int, default=64, help="of the adapters; alpha is twice that (%(default)s)")
    add("--freeze", nargs="*", choices=("vision", "projector", "language"), help="(lora: vision; full: nothing)")
    add("--dtype", help="of the weights (lora: the checkpoint's own; full: float32)")
    add("--epochs", type=float, default=3.0, help="(%(default)s)")
    add("--steps", type=int, help="instead of --epochs")
    add("--batch", type=int, default=1, metavar="N", help="records a step and device, packed (%(default)s)")
    add("--accumulate", type=int, default=8, metavar="N", help="steps an update (%(default)s)")
    add("--lr", type=float, help="(lora: 1e-4; full: 2e-5)")
    add("--warmup", type=int, default=50, metavar="N", help="updates (%(default)s)")
    add("--max-length", type=int, default=16384, metavar="N", help="tokens of a sample, windows counted (%(default)s)")
    add(
        "--negatives", type=int, default=1, metavar="N", help="absent labels asked for, of COCO and YOLO (%(default)s)"
    )
    add("--skip", type=int, default=0, metavar="N", help="bad records that may be left out (%(default)s)")
    add("--every", type=int, default=200, metavar="N", help="updates between checkpoints and looks (%(default)s)")
    add("--modes", nargs="+", default=["verified", "hybrid", "fast", "slow"], help="to answer in (all)")
    add("--best", default="hybrid", help="the mode whose F1 says which checkpoint is the best (%(default)s)")
    add("--log-every", type=int, default=10, metavar="N", help="(%(default)s)")
    add("--no-checkpointing", action="store_true", help="keep activations: faster, and much more memory")
    add("--no-first-look", action="store_true", help="do not answer --validate before the first step")
    add("--flex", action="store_true", help="attend by FlexAttention (CUDA)")
    add("--workers", type=int, default=2, metavar="N", help="processes that read pictures (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def gather(sources: list[str], args: argparse.Namespace, collator: Any) -> list[Any]:
    """The records of all sources that can be learnt. More bad ones than --skip end the program; all are named."""
    from tqdm import tqdm

    from training.data import read

    good: list[Any] = []
    bad: list[str] = []
    for source in sources:
        try:
            records = list(read(source, collator.processor.build_question, collator.none, args.negatives))
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"{source}: {type(error).__name__}: {error}")
        for record in tqdm(records, desc=source, unit="record", delay=0.5, disable=None):
            try:
                collator.check(record)
                good.append(record)
            except (ValueError, KeyError, TypeError) as error:
                what = str(error) if isinstance(error, ValueError) else repr(error)
                bad.append(what if what.startswith(record["name"]) else f"{record['name']}: {what}")
    for line in bad[:20]:
        print(f"bad record {line}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(good) + len(bad)} records are bad", file=sys.stderr)
    if len(bad) > args.skip:
        sys.exit(f"--skip {args.skip}: leave out so many with --skip {len(bad)}, or mend them")
    return good


def prepared(model: Any, args: argparse.Namespace) -> Any:
    """The model, with what is to be trained, and nothing else, asking for gradients."""
    parts = {"vision": model.vision_model, "projector": model.mlp1, "language": model.language_model}
    frozen = args.freeze if args.freeze is not None else ["vision"] if args.lora else []
    if args.lora:
        from peft import LoraConfig, get_peft_model

        towers = {"language": LINEARS, "vision": ["wqkv", "wo", "fc0", "fc1"]}
        targets = [name for tower, names in towers.items() if tower not in frozen for name in names]
        whole = [] if "projector" in frozen else PROJECTOR
        told = {"r": args.rank, "lora_alpha": 2 * args.rank, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**told, target_modules=targets, modules_to_save=whole))
        model.print_trainable_parameters()
    else:
        for name in frozen:
            parts[name].requires_grad_(False)
    if not args.no_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model


def tuner_class() -> Any:
    import torch
    from transformers import Trainer

    from training.pack import PARTS
    from training.validation import count, scores

    class Tuner(Trainer):
        """Trainer that tells the loss by part, and validates by answering."""

        processor: Any
        modes: list[str]
        control: Any

        def __init__(self, *args: Any, **told: Any):
            super().__init__(*args, **told)
            self.parts = torch.zeros(len(PARTS), 2)

        def compute_loss(self, model, inputs, return_outputs=False, **told):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **told)
            self.parts += outputs.parts.cpu()
            return (loss, outputs) if return_outputs else loss

        def log(self, logs: dict[str, float], *args: Any, **told: Any) -> None:
            if "loss" in logs:
                parts = self.accelerator.reduce(self.parts.to(self.args.device)).cpu()
                means = (parts[:, 0] / parts[:, 1].clamp(min=1)).tolist()
                logs |= {f"loss_{name}": round(mean, 4) for name, mean in zip(PARTS, means, strict=True)}
                self.parts.zero_()
            super().log(logs, *args, **told)

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            records = self.eval_dataset if eval_dataset is None else eval_dataset
            model = self.accelerator.unwrap_model(self.model)
            own = records[self.args.process_index :: self.args.world_size]
            counts = count(model, self.processor, own, self.modes)
            told = self.accelerator.reduce(torch.tensor([*counts.values()], device=self.args.device)).tolist()
            metrics = {
                f"{metric_key_prefix}_{mode}_{name}": round(value, 4)
                for mode, line in zip(self.modes, told, strict=True)
                for name, value in scores(line).items()
            }
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return Tuner


def export(model: Any, base: Path, folder: Path) -> None:
    """Writes a checkpoint in the official format: the base's files, and the model's weights in the base's types."""
    import shutil

    from huggingface_hub import save_torch_state_dict
    from safetensors import safe_open

    from hub.assembly import INDEX, is_weights

    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    shutil.copytree(base, folder, dirs_exist_ok=True, ignore=lambda _, names: [n for n in names if is_weights(n)])
    (folder / INDEX).unlink(missing_ok=True)
    types: dict[str, Any] = {}
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            types |= {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    weights = model.state_dict()
    missing = types.keys() - weights.keys()
    if missing:
        raise RuntimeError(f"the model lacks {sorted(missing)[:3]} of its base")
    # the stock's files hold the head and the embeddings it is tied to
    kept = {name: weights[name].to("cpu", dtype, copy=True).contiguous() for name, dtype in types.items()}
    save_torch_state_dict(kept, folder, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
