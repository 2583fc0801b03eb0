# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Serve a model over HTTP, by OpenAI's chat completions and by /v1/locate, with a page to try it.

`python serve.py --model nvidia/LocateAnything-3B`, then open http://127.0.0.1:8000. More in docs/serving.md.
"""

import argparse
import gc
import logging
import signal
import sys
from pathlib import Path

REMEDY = "It needs the group `serve`: pip install --group serve, in the environment that `make demo` makes"
DEMO_MODEL = Path(__file__).resolve().parent / "demo" / "checkpoint"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(argv: list[str] | None = None) -> int:
    """Run the server until it is told to stop (0) or its engine has failed (1)."""
    args = _arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logger = logging.getLogger("serving")
    if args.host not in LOOPBACK and args.api_key is None:
        logger.warning("--host %s: whoever reaches it may ask, as there is no --api-key", args.host)
    if args.model is None:
        logger.warning("no --model: the demo checkpoint answers, which knows coloured shapes only")
    # uvicorn raises a signal that it has drained for once more: it ends the process well, during loading as well
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))

    # Here and not above: --help and usage errors need not wait for torch
    import uvicorn

    from hub.engine_process import load_apart
    from hub.loading import ModelError
    from serving.app import build_app
    from serving.engine import Engine
    from serving.guard import PatientProtocol
    from serving.images import Limits

    try:
        model, processor = load_apart(
            args.model or str(DEMO_MODEL), device=args.device, dtype=args.dtype, quantize=args.quantize
        )
    except ModelError as error:
        sys.exit(f"serve.py: {error}")
    gc.freeze()  # a collection that went through all of torch would hold every client up by 0.2 s
    limits = Limits(
        body=args.max_body * 2**20,
        pixels=args.max_pixels * 10**6,
        tokens=args.max_tokens,
        seconds=args.client_timeout,
        remote=args.allow_remote_images,
    )
    engine = Engine(model, processor, rows=args.rows, waiting=args.max_waiting, limits=limits)
    engine.on_failure = lambda: setattr(server, "should_exit", True)
    name = args.name or ("demo" if args.model is None else Path(args.model).name)
    config = uvicorn.Config(
        build_app(engine, name=name, api_key=args.api_key),
        host=args.host,
        port=args.port,
        http=PatientProtocol,
        ws="none",
        log_config=None,
        access_log=False,  # the guard's lines have no query strings
        server_header=False,
        timeout_keep_alive=args.client_timeout,
        timeout_graceful_shutdown=args.drain,
        limit_concurrency=4 * engine.most,
    )
    server = uvicorn.Server(config)
    server.run()
    return int(engine.failed)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="serve.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", metavar="M", help="folder or hub id; without it, the demo checkpoint")
    parser.add_argument("--name", help="what clients call it; without it, the last part of M")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--api-key", metavar="K", help="what clients must send; other users of the machine can see it")
    keys.add_argument("--api-key-file", metavar="FILE", type=Path, help="a file that holds it")
    for option, default, what in (
        ("--rows", 32, "rows decoded at a time"),
        ("--max-waiting", 128, "rows that may wait"),
        ("--max-body", 20, "MiB of a request"),
        ("--max-pixels", 64, "million pixels of a picture"),
        ("--max-tokens", 2048, "tokens of an answer"),
        ("--client-timeout", 30, "seconds that a slow client has"),
        ("--drain", 60, "seconds for what is under way when it is told to stop"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=what)
    remote = "fetch pictures from http(s) addresses, of the public internet only"
    parser.add_argument("--allow-remote-images", action="store_true", help=remote)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--quantize", choices=("int8",), help="products of 8 bits, on a CPU")
    args = parser.parse_args(argv)
    if small := [name for name, value in vars(args).items() if type(value) is int and value < (name != "port")]:
        parser.error(f"--{small[0].replace('_', '-')}: expected 1 or more")
    if args.api_key_file is not None:
        try:
            args.api_key = args.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--api-key-file: cannot be read ({error})")
    if args.api_key == "":
        parser.error("--api-key: is empty")
    return args


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ImportError as missing:
        sys.exit(f"serve.py: {missing}. {REMEDY}")
