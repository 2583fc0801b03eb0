"""Load: very many rows through one call, as a stream, and very many calls; each answer compared with its row's alone.

    python benchmarks/load.py --rows 10000 --stream 10000 --calls 20000 [--slots 32] [--json FILE]

Rows are drawn from seeds: scenes (demo/scenes.py), questions, modes, limits and sampling parameters, greedy or sampled
with a generator of the row's own. Each distinct row is first run alone. Then come `--rows` of them through one
`generate` call; `--stream` requests, from ten threads at random times, a tenth of them cancelled at random times; and
`--calls` calls of one to three rows. It prints rows or calls a second, resident memory at marks on the way, and how
many rows differ from themselves alone, in tokens or forwards; where any does, it exits with status 1.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import StoppingCriteria

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import DEMO, count, environment, print_json, resident  # noqa: E402
from demo.scenes import scenes  # noqa: E402
from hub.loading import load  # noqa: E402

MODES = ("hybrid", "fast", "slow", "verified")
MARKS = 10
CLIENTS = 10


class Ask(NamedTuple):
    """One row: a prompt, its picture's features, and how it is decoded."""

    ids: list[int]
    features: torch.Tensor
    mode: str
    limit: int
    temperature: float
    penalty: float
    seed: int


class Marks(StoppingCriteria):
    """Notes resident memory at every `apart`th token of a call; ends no row."""

    def __init__(self, apart: int):
        self.apart, self.tokens, self.noted = apart, 0, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens += 1
        if self.tokens % self.apart == 0:
            self.noted.append(resident())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def asks(model: Any, processor: Any, distinct: int, seed: int) -> list[Ask]:
    """`distinct` rows, about four to a scene; the first prefix is every row's."""
    rng, made = random.Random(seed), []
    for scene in scenes(-(-distinct // 4), seed):
        pictures = processor.image_processor.preprocess([scene.image], return_tensors="pt")
        with torch.no_grad():
            features = model.extract_feature(**pictures)[0]
        for _ in range(4):
            label = rng.choice(scene.queries)
            content = [{"type": "image", "image": scene.image}]
            content.append({"type": "text", "text": processor.build_question("detect", [label])})
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            made.append(
                Ask(
                    inputs["input_ids"][0].tolist(),
                    features,
                    rng.choice(MODES),
                    rng.choice([1, 4, 16, 64]),
                    rng.choice([0.0, 0.0, 0.7, 1.3]),
                    rng.choice([1.0, 1.0, 1.15]),
                    rng.randrange(1 << 20),
                )
            )
    return made[:distinct]


def answers(model: Any, rows: list[Ask], **options: Any) -> list[tuple[list[int], int]]:
    """The answers of one call, without the padding behind them, and the forwards they took."""
    width, pad = max(len(row.ids) for row in rows), model.config.pad_token_id
    output = model.generate(
        input_ids=torch.tensor([[pad] * (width - len(row.ids)) + row.ids for row in rows]),
        attention_mask=torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows]),
        visual_features=[row.features for row in rows],
        generation_mode=[row.mode for row in rows],
        max_new_tokens=[row.limit for row in rows],
        temperature=[row.temperature for row in rows],
        repetition_penalty=[row.penalty for row in rows],
        generator=[torch.Generator().manual_seed(row.seed) for row in rows],
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    counts = (output.accepted_by >= 0).sum(1).tolist()
    sequences, forwards = output.sequences[:, width:].tolist(), output.row_forwards.tolist()
    return [(ids[:count], steps) for ids, count, steps in zip(sequences, counts, forwards, strict=True)]


def one_call(model: Any, distinct: list[Ask], alone: list, rows: int, slots: int, seed: int) -> dict:
    """`rows` rows through one call of `slots` slots."""
    chosen = random.Random(seed).choices(range(len(distinct)), k=rows)
    tokens = sum(len(alone[place][0]) for place in chosen)
    marks = Marks(max(1, tokens // MARKS))
    gc.collect()
    before, start = resident(), time.perf_counter()
    said = answers(model, [distinct[place] for place in chosen], max_batch_rows=slots, stopping_criteria=[marks])
    seconds = time.perf_counter() - start
    wrong = sum(ids != alone[place] for ids, place in zip(said, chosen, strict=True))
    record = {"rows": rows, "slots": slots, "wrong": wrong, "tokens": tokens, "seconds": seconds}
    return record | {"rows_a_second": rows / seconds, "resident": [before, *marks.noted]}


def streamed(model: Any, distinct: list[Ask], alone: list, rows: int, slots: int, seed: int) -> dict:
    """`rows` requests that come, and in part go, at random times."""
    rng, lock = random.Random(seed), threading.Lock()
    chosen = rng.choices(range(len(distinct)), k=rows)
    outputs, noted = {}, []
    every = max(1, rows // MARKS)

    def note(output: Any) -> None:
        """The answer, or how many tokens of it are right where the request was cancelled."""
        ids, forwards = alone[chosen[int(output.request_id)]]
        right = (output.generated_tokens, output.row_forwards) == (ids, forwards)
        if output.finish_reason == "cancelled":
            right = output.generated_tokens == ids[: len(output.generated_tokens)]
        with lock:
            outputs[output.request_id] = right, output.finish_reason == "cancelled"
            if len(outputs) % every == 0:
                noted.append(resident())

    def client(number: int) -> None:
        own = random.Random(f"{seed} {number}")
        for place in range(number, rows, CLIENTS):
            row = distinct[chosen[place]]
            manager.add_request(
                row.ids,
                str(place),
                row.limit,
                result_handler=note,
                visual_features=[row.features],
                generation_mode=row.mode,
                temperature=row.temperature,
                repetition_penalty=row.penalty,
                generator=torch.Generator().manual_seed(row.seed),
            )
            if own.random() < 0.1:
                time.sleep(own.expovariate(50))
                manager.cancel_request(str(place))
            elif own.random() < 0.1:
                time.sleep(own.expovariate(20))

    gc.collect()
    start = time.perf_counter()
    with model.continuous_batching_context_manager(max_batch_rows=slots, prefill_tokens=256) as manager:
        clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
    seconds = time.perf_counter() - start
    wrong = rows - sum(right for right, _ in outputs.values())
    record = {"rows": rows, "slots": slots, "wrong": wrong, "seconds": seconds, "rows_a_second": rows / seconds}
    return record | {"cancelled": sum(gone for _, gone in outputs.values()), "resident": noted}


def many_calls(model: Any, distinct: list[Ask], alone: list, calls: int, seed: int) -> dict:
    """`calls` calls of one to three rows of short answers, one after another."""
    rng = random.Random(seed)
    short = [place for place, row in enumerate(distinct) if row.limit <= 4]
    rows = wrong = 0
    noted = []
    gc.collect()
    start = time.perf_counter()
    for number in range(calls):
        if number % max(1, calls // MARKS) == 0:
            noted.append(resident())
        chosen = rng.choices(short, k=rng.randint(1, 3))
        said = answers(model, [distinct[place] for place in chosen], max_batch_rows=rng.choice([None, 1, 2]))
        wrong += sum(ids != alone[place] for ids, place in zip(said, chosen, strict=True))
        rows += len(chosen)
    seconds = time.perf_counter() - start
    record = {"calls": calls, "rows": rows, "wrong": wrong, "seconds": seconds}
    return record | {"calls_a_second": calls / seconds, "resident": [*noted, resident()]}


def megabytes(marks: list[int]) -> str:
    return " ".join(f"{mark / 2**20:.0f}" for mark in marks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(DEMO), help="a small one (default demo/checkpoint)")
    parser.add_argument("--rows", type=int, default=10000, help="rows of the one call (default 10000; 0 for none)")
    parser.add_argument("--stream", type=int, default=10000, help="requests of the stream (default 10000; 0 for none)")
    parser.add_argument("--calls", type=int, default=20000, help="short calls (default 20000; 0 for none)")
    parser.add_argument("--slots", type=count, default=32, help="rows decoded at a time in the one call (default 32)")
    parser.add_argument("--distinct", type=count, default=1000, help="different rows, run alone first (default 1000)")
    parser.add_argument("--threads", type=count, default=1, help="of torch (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="append the record to this file")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    model, processor = load(arguments.checkpoint, device="cpu", dtype="float32")
    record: dict[str, Any] = {"benchmark": "load", "seed": arguments.seed, **environment(model.device)}
    print(f"{arguments.checkpoint}, float32; {record['machine']}, {arguments.threads} threads, {record['date']}")
    distinct = asks(model, processor, arguments.distinct, arguments.seed)
    alone = [answers(model, [row])[0] for row in distinct]
    print(f"{len(distinct)} different rows, run alone: {sum(len(ids) for ids, _ in alone)} tokens", flush=True)
    wrong = 0
    if arguments.rows:
        one = record["one_call"] = one_call(model, distinct, alone, arguments.rows, arguments.slots, arguments.seed)
        wrong += one["wrong"]
        print(
            f"one call: {one['rows']} rows, {one['slots']} slots, {one['tokens']} tokens in {one['seconds']:.0f} s, "
            f"{one['rows_a_second']:.1f} rows/s; {one['wrong']} rows wrong\n  MB resident: "
            f"{megabytes(one['resident'])}",
            flush=True,
        )
    if arguments.stream:
        own = streamed(model, distinct, alone, arguments.stream, arguments.slots, arguments.seed)
        record["stream"] = own
        wrong += own["wrong"]
        print(
            f"stream: {own['rows']} rows, {own['cancelled']} of them cancelled, {own['slots']} slots, in "
            f"{own['seconds']:.0f} s, {own['rows_a_second']:.1f} rows/s; {own['wrong']} rows wrong\n  MB resident: "
            f"{megabytes(own['resident'])}",
            flush=True,
        )
    if arguments.calls:
        many = record["many_calls"] = many_calls(model, distinct, alone, arguments.calls, arguments.seed)
        wrong += many["wrong"]
        print(
            f"short calls: {many['calls']} with {many['rows']} rows in {many['seconds']:.0f} s, "
            f"{many['calls_a_second']:.1f} calls/s; {many['wrong']} rows wrong\n  MB resident: "
            f"{megabytes(many['resident'])}"
        )
    print_json(record, arguments.json)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
