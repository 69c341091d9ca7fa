"""What decoding in tiles saves and changes: memory, time, and the difference from the whole picture.

    python benchmarks/tiles.py [--pixels 512] [--tiles 128 256] [--layouts NAME ...] [--json-only]

Layouts are those of published tokenizers, with random weights, and the bundled models' tokenizers, which are trained;
these decode a picture that is a mosaic of their own. The difference is the largest of any sub-pixel, in bytes of 255.
Memory is the most that becomes resident while one picture is decoded (Linux). The last line is JSON.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import varkit
from varkit.cli.console import print_table
from varkit.decode.loop import run
from varkit.hardware import hardware
from varkit.hub.pipeline import bundled
from varkit.tokenizers.bitwise import BitwiseConfig
from varkit.tokenizers.conv import ConvConfig, Decoder
from varkit.tokenizers.kl import KLConfig
from varkit.tokenizers.multiscale_vq import MultiScaleVQConfig
from varkit.tokenizers.vq import VQConfig

LAYOUTS: dict[str, ConvConfig] = {
    "VAR": MultiScaleVQConfig().conv,
    "LlamaGen": VQConfig().conv,
    "Infinity": BitwiseConfig().conv,
    "KL-16": KLConfig().conv,
}


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    options = _options()
    rows = [row for layout in options.layouts for row in measure(layout, options.pixels, options.tiles)]
    if not options.json_only:
        print_table(tuple(rows[0]), [tuple(str(value) for value in row.values()) for row in rows])
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "hardware": hardware()}
    print(json.dumps({"what": "tiles", "pixels": options.pixels, "dtype": "float32", "rows": rows} | facts))


@torch.no_grad()
def measure(layout: str, pixels: int, tiles: list[int]) -> list[dict[str, Any]]:
    """A row for the whole picture, and one for each size of tiles."""
    decoder, features = _drawing(layout, pixels)
    rows: list[dict[str, Any]] = []
    whole = None
    for tile in (0, *tiles):
        decoder.tile = tile // decoder.stride
        before, began = _forget_peak(), time.perf_counter()
        picture = decoder(features)
        seconds = time.perf_counter() - began
        grown = _status("VmHWM") - before
        whole = picture if whole is None else whole
        difference = (picture.clamp(-1, 1) - whole.clamp(-1, 1)).abs() * 127.5
        figures = (seconds, grown / 1e6, float(difference.max()), float(difference.mean()))
        names = ("seconds", "MB", "largest difference", "mean difference")
        rows.append(
            {"layout": layout, "tile": tile or "whole"}
            | dict(zip(names, [float(f"{x:.3g}") for x in figures], strict=True))
        )
    return rows


def _drawing(layout: str, pixels: int) -> tuple[Decoder, Tensor]:
    """A decoder, and features of a picture of about pixels x pixels."""
    if layout in bundled():
        pipeline = varkit.load(layout)
        prompts = ["a red circle"] if layout == "scenes" else [i % 10 for i in range(16)]
        tokenizer = pipeline.tokenizer
        f_hat = run(pipeline.model, pipeline.start(prompts * (16 // len(prompts)))).canvas.f_hat
        side = f_hat.shape[-1]
        count = pixels // (side * tokenizer.stride)
        chosen = f_hat[torch.arange(count * count) % len(f_hat)].unflatten(0, (count, count))
        mosaic = chosen.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None]
        return tokenizer.decoder, tokenizer.post_quant_conv(mosaic)
    torch.manual_seed(0)
    config = LAYOUTS[layout]
    decoder = Decoder(config, level_attention=layout != "KL-16").eval()
    return decoder, torch.randn(1, config.latent_channels, pixels // config.stride, pixels // config.stride)


def _forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--tiles", type=int, nargs="+", default=[128, 256])
    parser.add_argument(
        "--layouts", nargs="+", default=[*bundled(), *LAYOUTS], choices=[*bundled(), *LAYOUTS]
    )
    parser.add_argument("--json-only", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
