# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Scan pictures: find what the queries describe in files, folders, lists and videos; a line of JSON for each answer.

`python locate.py` runs a demo; `python locate.py frames/ --query "red car" --model nvidia/LocateAnything-3B` is the
usual call, and the same call again goes on where it stopped. docs/scan.md describes it.
"""

import argparse
import gc
import math
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote


def _leave(*_: Any) -> None:
    """Ctrl-C before anything is written (transformers would take it for a missing package), and a second one."""
    os._exit(130)


def _interrupt(*_: Any) -> None:
    """The first Ctrl-C while results are written."""
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)

REMEDY = "It runs in the environment that `make demo` makes: source .venv/default/bin/activate"
try:
    from tqdm.auto import tqdm

    from hub.loading import ModelError
    from scan.formats import FORMATS, export
    from scan.records import MANIFEST, RESULTS, Record, Results, check, read_manifest, read_records
    from scan.sources import LISTS, SEPARATOR, estimate, name_of, natural, read_list, suffix_of
except ImportError as missing:
    sys.exit(f"locate.py: {missing}. {REMEDY}")

PROJECT = Path(__file__).resolve().parent
DEMO_MODEL = PROJECT / "demo" / "checkpoint"
DEMO_IMAGES = PROJECT / "demo" / "images"
DEMO_QUERIES = ["red circle", "orange cross", "green half circle", "blue circle"]
TASKS = ("detect", "ground", "single", "point", "text", "gui")
FEW = 8  # pictures that are drawn without --draw
# The arguments that may change from call to call; the others are settings of the scan
HOW = ["sources", "query", "model", "device", "batch_size", "out", "format", "draw", "ray", "retry_failed", "restart"]
GO_ON = """The same call again asks only what has no answer yet. To go on with pictures of your own:
  python locate.py PICTURES --query "red car" --model nvidia/LocateAnything-3B --out found
  python locate.py --out found --format coco,csv --draw     exports what was found, and draws all of it"""
TABLE = 32  # answers, or queries, that are told one by one
TOLD_ERRORS = 10
# What the table says of an answer that is not whole
CUT = {"limit": "cut off at --max-new-tokens", "repetition": "ended where it repeated itself"}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit code: 0; 1 if a question failed or the scan had to stop; 2 if the processor
        refuses a query; 130 if it was interrupted.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal may know fewer letters than labels and file names have
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parser = _parser()
    args = parser.parse_args(argv)
    later = not (args.sources or args.list) and (args.format or args.draw)
    try:
        if later and not (args.out / MANIFEST).is_file():
            raise ValueError(f"--out: {args.out} is no scan's folder, and no SOURCE is given")
        if not later:
            manifest = _manifest(args)
            check(args.out, manifest, restart=args.restart)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    again = shlex.join([*(["python", sys.argv[0]] if argv is None else ["locate.py"]), *(argv or sys.argv[1:])])
    kept = f"what is answered is kept in {args.out}. To go on: {again.replace(' --restart', '')}"
    try:
        return finish(args) if later else run(args, manifest)
    except KeyboardInterrupt:
        _complain(f"interrupted; {kept}")
        return 130
    except (ModelError, OSError, RuntimeError, ValueError) as error:
        _complain(str(error))
        if (args.out / MANIFEST).is_file():
            _complain(f"stopped; {kept}")
        return 1


def run(args: argparse.Namespace, manifest: dict[str, Any]) -> int:
    """Asks what is not answered yet, writes the answers as they come, and tells of them."""
    import torch  # here and not above, for --help and usage errors
    import transformers

    from hub.engine_process import load_apart
    from scan.workers import Interviewer, revision_of, scan

    if args.model is None and (args.sources or args.list):
        _complain("no --model: the demo checkpoint answers, which knows coloured shapes only")
    process, processes = _process()
    settings = {name: value for name, value in manifest["settings"].items() if name != "list"}
    settings["generation_mode"] = settings.pop("mode")
    loading = {"device": args.device, "dtype": settings.pop("dtype"), "quantize": settings.pop("quantize")}
    asked = {**settings, "max_batch_rows": args.batch_size}
    if processes > 1 and args.device != "cpu" and torch.cuda.is_available():
        loading["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    if args.ray is None:  # else the actors load it
        asked["model"], asked["processor"] = load_apart(manifest["model"], **loading)
        gc.freeze()  # a collection that went through all of torch would hold the threads up by 0.2 s
        try:
            Interviewer(asked["processor"], settings["queries"], settings["task"])
        except ValueError as error:
            _complain(f"--query: {error}")
            return 2
    manifest["versions"] = {each.__name__: each.__version__ for each in (torch, transformers)}
    manifest["revision"] = revision_of(manifest["model"])
    if old := [name for name in ("drawn", *FORMATS) if args.restart and (args.out / name).exists()]:
        _complain(f"{', '.join(old)} in {args.out}: of the scan before, but for what this one writes anew")
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _interrupt)
    results = Results(args.out, manifest, process, processes, retry_failed=args.retry_failed, restart=args.restart)
    asked["done"] = results.done
    try:
        if args.ray is None:
            answers = scan(_sources(args, manifest), process=process, processes=processes, **asked)
        else:
            from scan.ray import scan_on_ray

            asked |= {"model": manifest["model"], "loading": loading, "address": args.ray}
            answers = scan_on_ray(_sources(args, manifest), **asked)
        seen = {hash((record.source, record.frame)) for record in read_records(args.out)}
        bar = tqdm(unit=" pictures", initial=len(seen) // processes, delay=0.5, disable=process > 0)
        with closing(answers), bar:
            if process == 0:
                Thread(target=_count, args=(bar, args, manifest, processes), daemon=True).start()
            tell(answers, results, seen, bar)
    finally:
        whole = results.close()
    # Of several processes the last one to end tells; another exit code of an earlier one would end the others
    code = finish(args) if whole else 0
    if not (args.sources or args.list):
        print(f"\n{GO_ON}")
    return code


def tell(answers: Iterable[Record], results: Results, seen: set[int], bar: tqdm) -> None:
    """Writes the answers, and shows how it goes. `seen`: the pictures that have an answer."""
    boxes = errors = 0
    for record in answers:
        results.write(record)
        boxes += len(record.detections)
        if record.status == "error":
            errors += 1
            if errors <= TOLD_ERRORS:
                more = " (further errors are in the results only)" if errors == TOLD_ERRORS else ""
                _complain(f"{record.source}, query {record.query!r:.80}: {record.error}{more}")
        if (picture := hash((record.source, record.frame))) not in seen:
            seen.add(picture)
            bar.update()
            bar.set_postfix(boxes=boxes, errors=errors, refresh=False)


def finish(args: argparse.Namespace) -> int:
    """Exports, draws and sums up what a scan's folder holds. Returns the exit code."""
    from scan.workers import draw_pictures

    out = args.out
    export(out, args.format)
    manifest = read_manifest(out)
    video = {name: manifest["settings"][name] for name in ("fps", "every")}
    sources: Iterable[str] = _sources(args, manifest)
    if "-" in manifest["sources"]:  # the standard input is read only once
        sources = dict.fromkeys(record.source for record in read_records(out))
    drawn = Counter(draw_pictures(out, sources, most=None if args.draw else FEW, **video))
    for error in islice(filter(None, drawn), TOLD_ERRORS):
        _complain(error)
    if 0 < len(few := list(islice(read_records(out), TABLE + 1))) <= TABLE:
        print(table(sorted(few, key=lambda record: (natural(record.source), record.frame or 0))), end="\n\n")
    sums: dict[str, list[int]] = {}
    for record in read_records(out):
        found, failed = len(record.detections), record.status == "error"
        numbers = (1, found > 0, found, record.finish_reason in CUT, failed)
        sums[record.query] = [a + b for a, b in zip(sums.get(record.query, [0] * 5), numbers, strict=True)]
    lines = [[query, *map(str, numbers)] for query, numbers in islice(sums.items(), TABLE)]
    print(aligned(["query", "pictures", "with it", "found", "cut off", "failed"], lines))
    if len(sums) > TABLE:
        print(f"… and {len(sums) - TABLE} more queries")
    print(f"\n{out / RESULTS} has a line for each answer; drawn, in {out / 'drawn'}: {drawn[None]}.")
    if not sums:
        _complain("the sources have no pictures")
    return 1 if not sums or any(numbers[-1] for numbers in sums.values()) else 0


def table(records: Iterable[Record]) -> str:
    """What was found, one line each: image, query, label, score and pixels."""
    lines = []
    for record in records:
        name = record.source if record.frame is None else f"{record.source}, frame {record.frame}"
        for found in record.detections:
            kind, at = ("box", found.box) if found.box else ("point", found.point or ())
            score = "" if found.score is None else f"{found.score:.2f}"
            pixels = ", ".join(f"{value:.1f}" for value in at)
            lines.append([name, record.query, found.label, score, f"{kind} {pixels}"])
        cut = "failed" if record.status == "error" else CUT.get(record.finish_reason or "")
        if cut or not record.detections:
            lines.append([name, record.query, "-", "", cut or "nothing found"])
    return aligned(["image", "query", "label", "score", "pixels"], lines)


def aligned(head: list[str], lines: Iterable[Sequence[str]]) -> str:
    """Lines of cells in columns, long cells cut."""
    cells = [[" ".join(cell.split()) for cell in line] for line in lines]
    rows = [head, *([cell if len(cell) <= 60 else f"{cell[:59]}…" for cell in line] for line in cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(row.rstrip() for row in padded)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="locate.py",
        description="Find what the queries describe in the pictures. Without arguments: a demo on drawn shapes.",
        epilog="""examples:
  python locate.py
  python locate.py frames/ film.mp4 --fps 1 --query "red car" --query bicycle --model nvidia/LocateAnything-3B
  python locate.py screen.png --query "the save button" --task gui --model my/model --out found
  python locate.py --out found --format coco,csv     exports what an earlier call found
The same call again goes on where it stopped. Exit codes: 0, 1 (a question failed), 2 (usage), 130 (interrupted).""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    sources = "picture, video, folder, quoted glob, URL, data URI, .jsonl, .csv, .parquet, or - for lines of these"
    add("sources", nargs="*", metavar="SOURCE", help=sources)
    add("--list", metavar="FILE", help="a file with a source a line")
    add("--query", action="append", default=[], metavar="TEXT", help="what to find; repeat it for more questions")
    add("--queries", metavar="FILE", help="a file with a query a line")
    add("--task", choices=TASKS, default="detect", help="which question is asked (%(default)s)")
    add("--fps", type=_number(float, 0.001), metavar="N", help="frames a second of videos (all)")
    add("--every", type=_number(int, 1), default=1, metavar="N", help="only each Nth frame of videos")
    add("--model", help="folder or hub id (the small demo checkpoint)")
    modes, dtypes = ("hybrid", "fast", "slow", "verified"), ("auto", "float32", "bfloat16", "float16")
    add("--mode", choices=modes, default="hybrid", help="how to decode (%(default)s)")
    add("--verify-labels", action="store_true", help="verify the text of labels, for reading text")
    add("--threshold", type=_number(float, 0, 1), default=0.0, metavar="S", help="leave out lower scores")
    add("--keep-repetitions", action="store_true", help="do not end an answer that repeats its boxes")
    add("--max-new-tokens", type=_number(int, 1), default=2048, metavar="N", help="(%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    add("--dtype", choices=dtypes, default="auto", help="(%(default)s)")
    add("--quantize", choices=("int8",), help="products of 8 bits, on a CPU")
    add("--batch-size", type=_number(int, 1), metavar="N", help="questions at once, at most")
    add("--out", type=Path, default=Path("located"), metavar="DIR", help="where the results are kept (%(default)s)")
    add("--format", type=_listed, default=[], metavar="F,F", help=f"also write {', '.join(FORMATS)}")
    add("--draw", action="store_true", help=f"draw boxes on all pictures (without it: on {FEW})")
    add("--ray", nargs="?", const="", metavar="ADDRESS", help="on a Ray cluster, or on Ray here (docs/scan.md)")
    add("--retry-failed", action="store_true", help="ask again what failed")
    add("--restart", action="store_true", help="forget what an earlier call found")
    return parser


def _number(kind: type, least: float, most: float = math.inf) -> Any:
    expected = f"a {'whole number' if kind is int else 'number'} from {least}" + f" to {most}" * (most < math.inf)

    def read(text: str) -> Any:
        with suppress(ValueError):
            if least <= (number := kind(text)) <= most and number < math.inf:
                return number
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")

    return read


def _listed(text: str) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in FORMATS]:
        raise argparse.ArgumentTypeError(f"got {unknown[0]!r}, expected some of {','.join(FORMATS)}")
    return text.split(",")


def _manifest(args: argparse.Namespace) -> dict[str, Any]:
    """What the scan is asked, by which an earlier one is known again.

    Raises:
        ValueError, OSError: the arguments do not fit each other, or a file of them cannot be read.
    """
    own = bool(args.sources or args.list)
    sources = args.sources if own else [os.path.relpath(DEMO_IMAGES)]
    lines = [*args.query, *(read_list(args.queries) if args.queries else ())]
    queries = list(dict.fromkeys(query.strip() for line in lines for query in line.split(SEPARATOR)))
    if "" in queries:
        raise ValueError("--query: got an empty text, expected a description such as 'red circle'")
    if broken := [query for query in queries if query != query.encode(errors="replace").decode()]:
        raise ValueError(f"--query: got {broken[0]!r:.80}, expected UTF-8")
    next(read_list(args.list), None) if args.list else None  # or it is not there
    lists = args.list or any(source == "-" or suffix_of(source) in LISTS for source in sources)
    if own and not queries and args.task != "text" and not lists:
        raise ValueError("--query is needed with pictures of your own (--task text and lists can do without)")
    if "-" in sources and (_process()[1] > 1 or args.ray is not None):
        raise ValueError("-: got several processes, of which one has the standard input; expected --list FILE")
    if args.restart and _process()[1] > 1:
        raise ValueError("--restart: got several processes; expected one, or another --out")
    out = args.out.resolve()
    for source in filter(None, [*sources, args.list, args.queries]):
        path = unquote(source.partition("://")[2]) if source[:7].lower() == "file://" else source
        if "://" not in path and Path(path).resolve().is_relative_to(out):
            raise ValueError(f"--out: {args.out} would take results where {source} is, expected another folder")
    settings = {name: value for name, value in vars(args).items() if name not in HOW}
    settings["queries"] = queries or ([] if own or args.task == "text" else DEMO_QUERIES)
    # The names of the sources, as URLs hold credentials
    return {"model": args.model or str(DEMO_MODEL), "sources": [*map(name_of, sources)], "settings": settings}


def _sources(args: argparse.Namespace, manifest: dict[str, Any]) -> Iterator[str]:
    yield from args.sources or manifest["sources"]
    if manifest["settings"]["list"]:
        yield from read_list(manifest["settings"]["list"])


def _process() -> tuple[int, int]:
    """Which process this is of how many, as `accelerate launch` and `torchrun` say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _count(bar: tqdm, args: argparse.Namespace, manifest: dict[str, Any], processes: int) -> None:
    """Finds, beside the scan, how many pictures there will be, where that can be known."""
    if "-" not in manifest["sources"]:
        with suppress(Exception):  # the scan tells what is wrong with a source
            video = {name: manifest["settings"][name] for name in ("fps", "every")}
            bar.total = estimate(_sources(args, manifest), **video) // processes


def _complain(message: str) -> None:
    tqdm.write(f"locate.py: {message}", file=sys.stderr)


if __name__ == "__main__":
    try:
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interpreter's end would make it deadly again
        sys.exit(code)
    except ImportError as missing:  # torch and transformers, which come late
        sys.exit(f"locate.py: {missing}. {REMEDY}")
