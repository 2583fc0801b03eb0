"""Draws rows a second beside the stock loop's, from what `throughput.py --stock … --json …` or `make gpu` wrote.

python benchmarks/plot.py [benchmarks/results.jsonl | benchmarks/gpu-NAME.json]

The picture lies beside the file: speed.svg, or gpu-NAME.svg. Of each workload, number of rows and form of the weights
the last run counts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NAMES = {
    "images": "{} images, one question",
    "questions": "one image, {} questions",
    "long": "{} images, 4 × longer answers",
    "ragged": "{} images, ragged answers",
}
COLOURS = {"the stock loop": "#9aa5b1", "float32": "#7fb3d5", "bfloat16": "#1f618d", "int8": "#117864"}
WIDTH, LEFT, BAR, GAP = 760, 220, 16, 18


def records_of(path: Path) -> list[dict[str, Any]]:
    """The records with a stock loop, those of one machine, dtype of the stock and shape: the last record's."""
    text = path.read_text(encoding="utf-8")
    found = (
        [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)["throughput"]
    )
    found = [record for record in found if "stock_speedup" in record]
    same = ("machine", "scale", "stock_dtype", "size", "mode")
    return [record for record in found if all(record.get(key) == found[-1].get(key) for key in same)]


def main(path: Path = HERE / "results.jsonl") -> None:
    records = records_of(path)
    groups: dict[str, dict[str, float]] = {}
    for record in records:
        group = groups.setdefault(NAMES[record["workload"]].format(record["rows"]), {"the stock loop": 1.0})
        group[record.get("quantize") or record["dtype"]] = record["stock_speedup"]
    scale = (WIDTH - LEFT - 60) / max(max(speeds.values()) for speeds in groups.values())
    last, parts, y = records[-1], [], 46
    for name, speeds in groups.items():
        middle = y + BAR * len(speeds) / 2 + 4
        parts.append(f'<text x="{LEFT - 10}" y="{middle}" text-anchor="end">{name}</text>')
        for form, speed in speeds.items():
            width = speed * scale
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 2}" fill="{COLOURS[form]}"/>')
            parts.append(f'<text x="{LEFT + width + 6:.1f}" y="{y + 11}">{speed:.2f} ×</text>')
            y += BAR
        y += GAP
    legend, x = [], LEFT
    for label, colour in COLOURS.items():
        if not any(label in speeds for speeds in groups.values()):
            continue
        legend.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>')
        legend.append(f'<text x="{x + 18}" y="22">{label}</text>')
        x += 160
    caption = (
        f"rows a second, the stock's single-row loop in {last.get('stock_dtype', last['dtype'])} = 1. {last['scale']} "
        f"shape, random weights, {last['size']}, {last['machine']}, {last['date']}"
    )
    body = "\n".join([*legend, *parts, f'<text x="10" y="{y + 8}" font-size="10" fill="#555">{caption}</text>'])
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 20}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
    drawing = HERE / "speed.svg" if path.suffix == ".jsonl" else path.with_suffix(".svg")
    drawing.write_text(svg, encoding="utf-8")
    print(drawing)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
