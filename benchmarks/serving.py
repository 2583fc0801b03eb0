"""Serving: the server under load, against the same rows in one `generate`.

    python benchmarks/serving.py [--rows 512] [--clients 1,8,64] [--load 50,80] [--model demo/checkpoint] [--json FILE]

The rows are the demo's scenes, one question each, greedy, every one another picture. First `generate` answers them in
this process, the processor's work included and left out. Then serve.py runs in a process of its own, and as many
clients as told each send their next request when the last one is answered: rows/s, and as a share of generate's. At
last requests arrive by chance (Poisson, open loop: nobody waits for anybody) at shares of the rate that was reached,
streaming: p50 and p99 of the time to the first box and to the end. Clients run in this process and share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import DEMO, count, counts, environment, print_json  # noqa: E402
from demo.scenes import scenes  # noqa: E402
from hub.loading import load  # noqa: E402

SLOTS = 32  # rows decoded at a time, by generate and by the server


class Client:
    """Just enough HTTP/1.1, as the clients share two cores with what they measure."""

    def __init__(self, port: int):
        self.port = port

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def post(self, body: bytes) -> tuple[float, float, str]:
        """Seconds to the first box and to the end, and the answer's text."""
        start, first = time.perf_counter(), 0.0
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        self.writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        if " 200 " not in head.splitlines()[0]:
            raise RuntimeError(head)
        if length := re.search(r"content-length: (\d+)", head):
            answer = json.loads(await self.reader.readexactly(int(length[1])))
            text = answer["choices"][0]["message"]["content"]
        else:
            text = ""
            while size := int(await self.reader.readline(), 16):
                event = (await self.reader.readexactly(size + 2)).strip().removeprefix(b"data: ")
                if event.startswith(b"{"):
                    text += "".join(c["delta"].get("content", "") for c in json.loads(event)["choices"])
                first = first or (time.perf_counter() - start if "</box>" in text else 0.0)
            await self.reader.readline()
        seconds = time.perf_counter() - start
        return first or seconds, seconds, text


async def closed_loop(port: int, bodies: Sequence[bytes], clients: int) -> tuple[float, list[str]]:
    """Rows a second of so many clients that wait for their answers, and the answers."""
    texts, waiting = [""] * len(bodies), iter(range(len(bodies)))

    async def run() -> None:
        async with Client(port) as client:
            for place in waiting:
                texts[place] = (await client.post(bodies[place]))[2]

    start = time.perf_counter()
    await asyncio.gather(*(run() for _ in range(clients)))
    return len(bodies) / (time.perf_counter() - start), texts


async def open_loop(port: int, bodies: Sequence[bytes], rate: float) -> list[tuple[float, float]]:
    """Seconds to the first box and to the end of requests that arrive at `rate` a second."""
    draw, tasks = random.Random(0), []

    async def one(body: bytes) -> tuple[float, float]:
        async with Client(port) as client:
            return (await client.post(body))[:2]

    due = time.perf_counter()
    for body in bodies:
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(body)))
    return list(await asyncio.gather(*tasks))


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def cpu_seconds(process: int) -> float:
    """Of a process so far, all its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def generate_alone(model: Any, processor: Any, conversations: list) -> tuple[float, float, list[str]]:
    """Seconds of the processor and of generate, for all rows in one call each; the texts."""
    start = time.perf_counter()
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, padding=True, return_dict=True
    ).to(model.device)
    prepared = time.perf_counter()
    sequences = model.generate(**inputs, max_new_tokens=256, max_batch_rows=SLOTS)
    done = time.perf_counter()
    texts = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return prepared - start, done - prepared, texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=count, default=512)
    parser.add_argument("--clients", type=counts, default=[1, 8, 64])
    parser.add_argument("--load", type=counts, default=[50, 80], help="percent of the rate reached, for the open loop")
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--port", type=count, default=8471)
    parser.add_argument("--json", metavar="FILE", help="append one line per result")
    args = parser.parse_args()

    model, processor = load(args.model)
    conversations, bodies = [], []
    for scene in scenes(args.rows, seed=17):
        conversations += processor.questions(scene.image, scene.queries[0])
        picture = io.BytesIO()
        scene.image.save(picture, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
        question = conversations[-1][0]["content"][1]
        content = [{"type": "image_url", "image_url": {"url": url}}, question]
        bodies.append({"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 256})
    requests = [json.dumps(body).encode() for body in bodies]
    streaming = [json.dumps({**body, "stream": True}).encode() for body in bodies]

    where = environment(torch.device(model.device))
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    generate_alone(model, processor, conversations[:SLOTS])  # first uses
    spent = time.process_time()
    preparing, generating, texts = generate_alone(model, processor, conversations)
    both, alone, spent = args.rows / (preparing + generating), args.rows / generating, time.process_time() - spent
    print(f"generate: {alone:.1f} rows/s; with the processor {both:.1f} rows/s; {args.rows} rows, {SLOTS} at a time")
    print(f"          {1e3 * spent / args.rows:.1f} ms of CPU a row, the processor's included")
    record = {**where, "rows": args.rows, "generate": alone, "processor_and_generate": both}
    del model

    command = [sys.executable, str(ROOT / "serve.py"), "--model", args.model, "--name", "m", "--port", str(args.port)]
    command += ["--rows", str(SLOTS), "--max-waiting", str(args.rows)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        while "Uvicorn running" not in (line := server.stderr.readline()):
            if not line:
                raise SystemExit(f"serve.py ended with {server.wait()}")
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        reached = 0.0
        asyncio.run(closed_loop(args.port, requests[:SLOTS], 8))
        for clients in args.clients:
            spent = cpu_seconds(server.pid)
            rate, said = asyncio.run(closed_loop(args.port, requests, clients))
            spent = 1e3 * (cpu_seconds(server.pid) - spent) / args.rows
            reached = max(reached, rate)
            equal = sum(one == other for one, other in zip(said, texts, strict=True))
            shares = f"{rate / alone:.0%} of generate's, {rate / both:.0%} with the processor"
            told = f"{rate:.1f} rows/s, {shares}; {spent:.1f} ms of CPU a row"
            print(f"{clients:4d} clients: {told}; {equal} of {args.rows} answers equal")
            record |= {f"rows_per_second_{clients}": rate, f"equal_{clients}": equal}
        for load_percent in args.load:
            rate = reached * load_percent / 100
            times = asyncio.run(open_loop(args.port, streaming, rate))
            told = {}
            for name, values in zip(("first box", "end"), zip(*times, strict=True), strict=True):
                told |= {f"{name} p{percent}": quantile(values, percent / 100) for percent in (50, 99)}
            milliseconds = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in told.items())
            print(f"{rate:6.1f} requests/s ({load_percent}%): {milliseconds}")
            record |= {f"{name}, load {load_percent}": value for name, value in told.items()}
    finally:
        server.terminate()
        server.wait()
        drain.wait()
    print_json(record, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
