"""Draws benchmarks/speed.svg from benchmarks/results.jsonl (which `throughput.py --stock … --json …` appends to).

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = {
    "images": "8 images, one question",
    "questions": "one image, 8 questions",
    "long": "8 images, 4 × longer answers",
    "ragged": "8 images, ragged answers",
}
BARS = (("stock", "the stock loop", "#9aa5b1"), ("loop", "this, row by row", "#7fb3d5"), ("batch", "this", "#1f618d"))
WIDTH, LEFT, BAR, GAP = 760, 220, 16, 18


def main() -> None:
    records = {}
    for line in (HERE / "results.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "stock_speedup" in record:
            records[record["workload"]] = record  # the last run of a workload counts
    groups = []
    for workload, record in records.items():
        speed = record["stock_speedup"]
        groups.append((workload, {"stock": 1.0, "loop": speed / record["loop_speedup"], "batch": speed}))
    most = max(speeds["batch"] for _, speeds in groups)
    scale = (WIDTH - LEFT - 60) / most
    last = next(reversed(records.values()))
    parts, y = [], 46
    for workload, speeds in groups:
        middle = y + BAR * len(BARS) / 2 + 4
        parts.append(f'<text x="{LEFT - 10}" y="{middle}" text-anchor="end">{NAMES[workload]}</text>')
        for name, _, colour in BARS:
            width = speeds[name] * scale
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + width + 6:.1f}" y="{y + 11}">{speeds[name]:.2f} ×</text>')
            y += BAR
        y += GAP
    legend, x = [], LEFT
    for _, label, colour in BARS:
        legend.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>')
        legend.append(f'<text x="{x + 18}" y="22">{label}</text>')
        x += 160
    caption = (
        f"rows a second, the stock's single-row loop = 1. {last['scale']} shape, random {last['dtype']} weights, "
        f"{last['size']}, {last['new_tokens']} new tokens, {last['machine']}, {last['date']}"
    )
    body = "\n".join([*legend, *parts, f'<text x="10" y="{y + 8}" font-size="10" fill="#555">{caption}</text>'])
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 20}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )
    (HERE / "speed.svg").write_text(svg)
    print(HERE / "speed.svg")


if __name__ == "__main__":
    main()
