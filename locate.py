# Copyright 2026 The LocateAnything-batched authors. SPDX-License-Identifier: Apache-2.0
"""Ground pictures: find what the queries describe, print a table, write JSON and the pictures with boxes drawn.

`python locate.py` runs a demo; `python locate.py street.jpg --query "red car" --model nvidia/LocateAnything-3B` is
the usual call.
"""

import argparse
import colorsys
import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REMEDY = "It runs in the environment that `make demo` makes: source .venv/default/bin/activate"
try:
    from PIL import Image, ImageDraw, ImageFont
    from tqdm.auto import tqdm

    from hub.loading import ModelError, load
except ImportError as missing:
    sys.exit(f"locate.py: {missing}. {REMEDY}")

PROJECT = Path(__file__).resolve().parent
DEMO_MODEL = PROJECT / "demo" / "checkpoint"
DEMO_IMAGES = PROJECT / "demo" / "images"
DEMO_QUERIES = ("red circle", "orange square", "blue triangle", "yellow triangle")
TASKS = ("detect", "ground", "single", "point", "text", "gui")
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

MIN_SIDE = 320  # smaller pictures are enlarged before drawing, so that labels can be read
MAX_ENLARGED_SIDE = 4096
# What the table says of an answer that is not whole
CUT = {"limit": "cut off at --max-new-tokens", "error": "broken off by an error"}


@dataclass(frozen=True)
class Detection:
    """One thing found: `at` holds the pixels (x1, y1, x2, y2) of a box or (x, y) of a point, `score` is in [0, 1]."""

    label: str
    at: tuple[float, ...]
    score: float | None = None

    @property
    def kind(self) -> str:
        return "box" if len(self.at) == 4 else "point"


@dataclass
class Picture:
    """One readable image of the command line, and what was found in it so far."""

    source: str
    file_name: str
    image: Image.Image
    size: tuple[int, int]
    rows: list[dict[str, Any]] = field(default_factory=list)
    drawn: bool = False


@dataclass(frozen=True)
class Row:
    """One row of a batch: one question about one picture."""

    picture: Picture
    query: str
    question: str
    is_last: bool


class Locator:
    """A model and its processor, loaded when they are first needed.

    Args:
        model: folder or hub id, with this project's code or the official's.
        device: "auto", "cpu" or "cuda".
        dtype: "auto" for the checkpoint's own, or the name of a torch dtype.
    """

    def __init__(self, model: str, device: str = "auto", dtype: str = "auto") -> None:
        self.name = model
        self.device = device
        self.dtype = dtype

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return load(self.name, device=self.device, dtype=self.dtype)

    @cached_property
    def model(self) -> Any:
        return self.loaded[0]

    @property
    def processor(self) -> Any:
        return self.loaded[1]

    def check(self, size: tuple[int, int], name: str) -> None:
        """Refuse a picture that the vision tower has no positions for.

        Args:
            size: width and height in pixels.
            name: what the error calls the picture.

        Raises:
            ValueError: the picture is too large on a side.
            ModelError: the processor, which knows the limit, cannot be loaded.
        """
        self.processor.image_processor.grid_of(size[1], size[0], name)

    def __call__(
        self,
        rows: Sequence[Row],
        mode: str,
        max_new_tokens: int,
        *,
        verify_labels: bool = False,
        threshold: float = 0.0,
        keep_repetitions: bool = False,
    ) -> list[dict[str, Any]]:
        """Answer one batch.

        Args:
            rows: the questions.
            mode: generation mode of all rows.
            max_new_tokens: limit of each answer.
            verify_labels: accept the text of labels as mode "verified" does.
            threshold: detections with a lower score are left out.
            keep_repetitions: let answers that go round in circles run to their limit.

        Returns:
            For each row its `text`, its `finish_reason` and `error` (of generate's `row_errors`), and its list of
            `detections`.

        Raises:
            ModelError: the model cannot be loaded.
        """
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": row.picture.image}, {"type": "text", "text": row.question}],
                }
            ]
            for row in rows
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model.generate(
            **inputs,
            generation_mode=mode,
            verify_labels=verify_labels,
            max_new_tokens=max_new_tokens,
            stopping_criteria=[] if keep_repetitions else [self.model.degenerate_answer_criteria()],
            return_dict_in_generate=True,
            output_scores=True,
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        answers = [
            ids[~scores.isnan()] for ids, scores in zip(new, output.token_log_probs, strict=True)
        ]  # without padding
        sizes = [(row.picture.size[1], row.picture.size[0]) for row in rows]
        found = self.processor.post_process_grounding(output, target_sizes=sizes, threshold=threshold)
        texts = self.processor.batch_decode(answers, skip_special_tokens=False)
        end = self.processor.tokenizer.eos_token
        return [
            {"text": text.split(end)[0], "finish_reason": reason, "error": error, "detections": _detections(row)}
            for text, reason, error, row in zip(texts, output.finish_reasons, output.row_errors, found, strict=True)
        ]


def draw(picture: Image.Image, detections: Iterable[Detection], colours: dict[str, Colour]) -> Image.Image:
    """Draw boxes, points and labels on a copy of a picture; a small picture is enlarged by a whole factor.

    Args:
        picture: the RGB picture.
        detections: what was found in it, in its pixels.
        colours: label -> RGB; labels that are missing are added, each with a hue of its own.

    Returns:
        The drawing.
    """
    factor = min(math.ceil(MIN_SIDE / min(picture.size)), max(1, MAX_ENLARGED_SIDE // max(picture.size)))
    canvas = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    short = min(canvas.size)
    width = max(2, short // 200)
    font = ImageFont.load_default(size=max(13, short // 30))
    placed: list[Box] = []
    for found in detections:
        colour = colours.setdefault(found.label, _colour(len(colours)))
        xs, ys = (sorted(value * factor for value in found.at[axis::2]) for axis in (0, 1))
        if found.kind == "point":
            radius = 3 * width
            spot = (xs[0] - radius, ys[0] - radius, xs[0] + radius, ys[0] + radius)
            pen.ellipse(spot, fill=colour, outline="white", width=max(1, width // 2))
        else:
            spot = (xs[0], ys[0], xs[1], ys[1])
            # A dark and a light line beside the coloured one show on any background
            pen.rectangle(_grown(spot, 1), outline="white", width=width + 2)
            pen.rectangle(_grown(spot, 2), outline="black", width=1)
            pen.rectangle(spot, outline=colour, width=width)
        score = "" if found.score is None else f" {found.score:.2f}"
        _draw_label(pen, canvas.size, font, f"{found.label}{score}", spot, colour, placed)
    return canvas


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit code: 0, or 1 if a picture or the model could not be used, or an error ended an answer or the run.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    sources = args.images or sorted(os.path.relpath(path) for path in DEMO_IMAGES.glob("*.png"))
    if not all(query.strip() for query in args.query):
        parser.error("--query: got an empty text, expected a description such as 'red circle'")
    if args.images and not args.query and args.task != "text":
        parser.error("--query is needed with images of your own (only --task text can do without)")
    queries = args.query or ([""] if args.task == "text" else DEMO_QUERIES)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file, expected a folder")
    names = _file_names(sources)
    overwritten = _overwritten(args.out, [*names, "results.json"], sources)
    if overwritten is not None:
        parser.error(
            f"--out: {args.out} would take results where the picture {overwritten} is, expected another folder"
        )

    if args.images and args.model is None:
        _complain("no --model: the demo checkpoint answers, which knows coloured shapes only")
    locator = Locator(args.model or str(DEMO_MODEL), args.device, args.dtype)
    errors: list[dict[str, str]] = []
    pictures: list[Picture] = []
    rows = _rows(_read(sources, names, locator, errors), queries, locator, args.task, pictures)
    import torch  # here and not above, for --help and usage errors

    try:
        _answer(rows, locator, args, len(sources) * len(queries), errors)
        if not pictures:
            raise ValueError("no image could be used")
    except (ModelError, OSError, ValueError, torch.OutOfMemoryError) as error:
        _complain(str(error))
        errors.append({"error": str(error)})
        pictures = [picture for picture in pictures if picture.rows]
        if not pictures:
            return 1
    results = {
        "model": locator.name,
        "task": args.task,
        "generation_mode": args.mode,
        "verify_labels": args.verify_labels,
        "threshold": args.threshold,
        "keep_repetitions": args.keep_repetitions,
        "images": [_as_json(picture) for picture in pictures],
        "errors": errors,
    }
    print(table(pictures))
    try:
        _write(args.out / "results.json", (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        _complain(str(error))
        return 1
    drawn = sum(picture.drawn for picture in pictures)
    count = "1 picture" if drawn == 1 else f"{drawn} pictures"
    print(f"\n{count} and results.json in {args.out}")
    if bad := [error["image"] for error in errors if error.keys() == {"image", "error"}]:
        _complain(f"{len(bad)} of {len(sources)} images could not be used: {', '.join(bad)}")
    return 1 if errors else 0


def table(pictures: Sequence[Picture]) -> str:
    """What was found, one line each: image, query, label, score and pixels, in aligned columns."""
    lines = [["image", "query", "label", "score", "pixels"]]
    for picture in pictures:
        for row in picture.rows:
            for found in row["detections"]:
                numbers = ", ".join(f"{value:.1f}" for value in found.at)
                score = "" if found.score is None else f"{found.score:.2f}"
                lines.append([picture.source, row["query"], found.label, score, f"{found.kind} {numbers}"])
            cut = CUT.get(row["finish_reason"])
            if cut or not row["detections"]:
                lines.append([picture.source, row["query"], "-", "", cut or "nothing found"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="locate.py",
        description="Find what the queries describe in the images. Without arguments: a demo on drawn shapes.",
        epilog="""examples:
  python locate.py
  python locate.py street.jpg --query "red car" --query bicycle --model nvidia/LocateAnything-3B
  python locate.py screen.png --query "the save button" --task gui --model my/model --out found""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="file, URL or data URI")
    parser.add_argument(
        "--query", action="append", default=[], metavar="TEXT", help="what to find; repeat it for more"
    )
    parser.add_argument("--task", choices=TASKS, default="detect", help="which question is asked (%(default)s)")
    parser.add_argument("--model", help="folder or hub id (the small demo checkpoint)")
    modes, dtypes = ("hybrid", "fast", "slow", "verified"), ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--mode", choices=modes, default="hybrid", help="how to decode (%(default)s)")
    parser.add_argument("--verify-labels", action="store_true", help="verify the text of labels, for reading text")
    parser.add_argument(
        "--threshold", type=_share, default=0.0, metavar="S", help="leave out what scores lower, 0 to 1 (%(default)s)"
    )
    parser.add_argument("--keep-repetitions", action="store_true", help="do not end an answer that repeats its boxes")
    parser.add_argument("--max-new-tokens", type=_positive, default=2048, metavar="N", help="(%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="(%(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="questions at once (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("located"), metavar="DIR", help="(%(default)s)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 up")
    return int(text)


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (number := float(text)) <= 1:
            return number
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 to 1")


def _answer(
    rows: Iterator[Row], locator: Locator, args: argparse.Namespace, total: int, errors: list[dict[str, str]]
) -> None:
    """Ask the rows in batches, and write each picture as soon as its last row is answered."""
    colours: dict[str, Colour] = {}
    # Delayed past the model's own loading bar
    with tqdm(total=total, desc="grounding", unit="question", delay=0.1) as bar:
        while batch := list(islice(rows, args.batch_size)):
            args.out.mkdir(parents=True, exist_ok=True)
            answers = locator(
                batch,
                args.mode,
                args.max_new_tokens,
                verify_labels=args.verify_labels,
                threshold=args.threshold,
                keep_repetitions=args.keep_repetitions,
            )
            for row, answer in zip(batch, answers, strict=True):
                picture = row.picture
                if (error := answer.pop("error")) is not None:
                    error = error.partition(": ")[2]  # without the row's number in its batch
                    _complain(f"{picture.source}, query {row.query!r}: {error}")
                    errors.append({"image": picture.source, "query": row.query, "error": error})
                picture.rows.append({"query": row.query, "question": row.question, **answer})
                if row.is_last:
                    everything = [found for done in picture.rows for found in done["detections"]]
                    _write_picture(args.out / picture.file_name, draw(picture.image, everything, colours))
                    picture.drawn = True
                    # Many large pictures would not fit in memory at once
                    picture.image.close()
            bar.update(len(batch))


def _overwritten(out: Path, names: Sequence[str], sources: Sequence[str]) -> str | None:
    """The first picture that lies in `out`, or that is one of `names` in it, by whatever path or link."""

    def identities(path: str | Path) -> set[Any]:
        found: set[Any] = {os.path.realpath(path).casefold()}  # some file systems do not tell a.png from A.PNG
        with contextlib.suppress(OSError):
            found.add((os.stat(path).st_dev, os.stat(path).st_ino))
        return found

    folder = identities(out)
    written = set().union(*(identities(out / name) for name in names))
    for source in sources:
        scheme, _, rest = source.partition(":")
        if scheme.lower() in ("data", "http", "https"):
            continue
        plain = rest.removeprefix("//") if scheme.lower() == "file" else source
        for path in (plain, unquote(plain)):
            folders = identities(os.path.dirname(path) or ".") | identities(os.path.dirname(os.path.realpath(path)))
            if folders & folder or identities(path) & written:
                return source
    return None


def _read(
    sources: Sequence[str], names: Sequence[str], locator: Locator, errors: list[dict[str, str]]
) -> Iterator[Picture]:
    """The pictures that can be used, one at a time and upright; the others are reported by name."""
    from image_processing import load_image, shorten  # here and not above, as it brings torch

    for source, file_name in zip(sources, names, strict=True):
        # A data URI is a picture, not a name, and a URL may hold credentials
        name = source[:40] + "..." if source[:5].lower() == "data:" else source
        name = shorten(name)[1:-1] if "://" in name else name
        try:
            image = load_image(source, upright=True)
            locator.check(image.size, f"image {name!r}")
        except ValueError as error:
            _complain(str(error))
            errors.append({"image": name, "error": str(error)})
            continue
        yield Picture(name, file_name, image, image.size)


def _rows(
    pictures: Iterable[Picture], queries: Sequence[str], locator: Locator, task: str, seen: list[Picture]
) -> Iterator[Row]:
    for picture in pictures:
        seen.append(picture)
        for number, query in enumerate(queries, start=1):
            # Without a query the text task asks for all text
            question = locator.processor.build_question(task, [query] if query else [])
            yield Row(picture, query, question, number == len(queries))


def _file_names(sources: Sequence[str]) -> list[str]:
    """For each source a PNG's name after its own, told apart from the others', in lower case too."""
    names: list[str] = []
    taken: set[str] = set()
    for source in sources:
        stem = "image" if source[:5].lower() == "data:" else Path(urlsplit(source).path).stem or "image"
        name, number = f"{stem}.png", 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}.png"
        taken.add(name.casefold())
        names.append(name)
    return names


def _detections(row: dict[str, Any]) -> list[Detection]:
    labels = row["labels"] + row["point_labels"]
    places = row["boxes"].tolist() + row["points"].tolist()
    scores = row["scores"].tolist() + row["point_scores"].tolist()
    return [Detection(label, tuple(at), score) for label, at, score in zip(labels, places, scores, strict=True)]


def _as_json(picture: Picture) -> dict[str, Any]:
    rows = [{**row, "detections": list(map(_detection_as_json, row["detections"]))} for row in picture.rows]
    width, height = picture.size
    drawn = picture.file_name if picture.drawn else None
    return {"image": picture.source, "width": width, "height": height, "picture": drawn, "answers": rows}


def _detection_as_json(found: Detection) -> dict[str, Any]:
    at = [round(value, 2) for value in found.at]
    return {"label": found.label, found.kind: at, "score": None if found.score is None else round(found.score, 4)}


def _colour(index: int) -> Colour:
    # Steps of the golden ratio keep any number of hues apart
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.9, 0.95 - 0.3 * (index % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def _grown(box: Box, by: float) -> Box:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by


def _draw_label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    font: Any,
    label: str,
    spot: Box,
    colour: Colour,
    placed: list[Box],
) -> None:
    """Write a label on its colour at the first free place about `spot` that lies inside the picture."""
    text = " ".join(label.split())
    while text and pen.textlength(text, font=font) > size[0] - 6:
        text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
    if not text:
        return
    wide, high = pen.textlength(text, font=font) + 6, sum(font.getmetrics()) + 2
    x = min(max(spot[0], 0), size[0] - wide)
    # Above the box, in it, below it, then wherever it falls
    places = [(x, min(max(y, 0), size[1] - high)) for y in (spot[1] - high, spot[1], spot[3], spot[3] - high)]
    boxes = [(left, top, left + wide, top + high) for left, top in places]
    box = next((b for b in boxes if not any(_overlap(b, other) for other in placed)), boxes[0])
    placed.append(box)
    pen.rectangle(box, fill=colour, outline="black")
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    pen.text((box[0] + 3, box[1] + 1), text, font=font, fill="black" if luminance > 140 else "white")


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _write_picture(path: Path, picture: Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _complain(message: str) -> None:
    tqdm.write(f"locate.py: {message}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ImportError as missing:  # torch and transformers, which come late
        sys.exit(f"locate.py: {missing}. {REMEDY}")
