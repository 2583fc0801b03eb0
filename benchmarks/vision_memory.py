"""Peak memory of the vision tower by image size: linear in patches, up to the largest image there is.

    python benchmarks/vision_memory.py [--layers 3] [--dtype bfloat16]

One image of 6400, 12800, 19200 and 25,600 patches, at the real width; fewer layers change the time, not the peak. Each
size runs in a process of its own, so that the peak is its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import PeakMemory, count, environment, import_drop_in

GRIDS = ((80, 80), (80, 160), (120, 160), (160, 160))


def peak_of(grid: tuple[int, int], layers: int, dtype: torch.dtype, device: torch.device) -> tuple[int, float]:
    """(peak bytes above weights and pixels, seconds) of one image."""
    import_drop_in()
    from locateanything.configuration import MoonViTConfig
    from locateanything.vision import MoonViTModel

    config = MoonViTConfig(num_hidden_layers=layers, attn_implementation="sdpa")
    model = MoonViTModel(config).to(device, dtype).eval()
    pixels = torch.randn(grid[0] * grid[1], 3, 14, 14).to(device, dtype)
    with torch.no_grad():
        model(pixels[:64], [(8, 8)])  # libraries set themselves up
        start = time.perf_counter()
        with PeakMemory(device) as peak:
            model(pixels, [grid])
        return peak.bytes, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=count, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--grid", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.grid:
        height, width = map(int, arguments.grid.split("x"))
        print(*peak_of((height, width), arguments.layers, getattr(torch, arguments.dtype), device))
        return
    print(", ".join(f"{name} {value}" for name, value in environment(device).items()))
    for height, width in GRIDS:
        command = [sys.executable, __file__, "--grid", f"{height}x{width}", "--layers", str(arguments.layers)]
        command += ["--dtype", arguments.dtype, "--device", arguments.device]
        bytes_, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        patches = height * width
        print(f"{patches:6} patches: peak +{int(bytes_) / 1e6:7.1f} MB, {int(bytes_) / patches:6.0f} bytes a patch, "
              f"{float(seconds):.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
