"""How long does a closed form take where text enters SDXL, SD 3.5, FLUX.1 and Qwen-Image, and how much memory?

    python benchmarks/text_entries.py --out data/results/benchmark_text_entries.json

The denoisers are the real classes at their true shapes, without memory for their weights; the text entries alone get
random ones. Random rows stand for what a pipeline feeds: a timing, never a result. One concept, one preserved prompt
and the empty one, by UCE with `tokens="last_to_end"`, from the third position on. "solve" and "apply" lead from rows of
text to edited weights; "store" makes the factors that an Edit keeps. Each family has a process of its own; "beyond_mb"
is its peak of memory with all three less that with rows and weights alone.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import diffusers
import torch
from closed_form import SHAPES

from erasekit.closed_form import Rows
from erasekit.evaluate.records import Result, save
from erasekit.evaluate.runs import machine
from erasekit.layers import cross_attention_kv
from erasekit.methods import uce

SDXL = SHAPES["sdxl"] | dict(
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816
)
SD35_MEDIUM = dict(
    num_layers=24, num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536,
    pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
)  # fmt: skip

# family: (class, its config, rows of a prompt, {space: layers, or None for keys and values}, columns of the pooled)
FAMILIES = {
    "SD 1.4": (diffusers.UNet2DConditionModel, SHAPES["sd14"], 77, [None], 0),
    "SDXL": (diffusers.UNet2DConditionModel, SDXL, 77, [None, ["add_embedding.linear_1"]], 1280),
    "SD 3.5 medium": (
        diffusers.SD3Transformer2DModel,
        SD35_MEDIUM,
        77 + 256,
        [["context_embedder"], ["time_text_embed.text_embedder.linear_1"]],
        2048,
    ),
    "FLUX.1": (
        diffusers.FluxTransformer2DModel,
        {},
        512,
        [["context_embedder"], ["time_text_embed.text_embedder.linear_1"]],
        768,
    ),
    "Qwen-Image": (diffusers.QwenImageTransformer2DModel, {}, 32, [["txt_in"]], 0),
}
REPEATS = 5


def cell(family: str) -> dict:
    """One row of the table."""
    cls, config, length, spaces, pooled = FAMILIES[family]
    with torch.device("meta"):
        denoiser = cls(**config)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    given = []
    for layers in spaces:
        found = (
            cross_attention_kv(denoiser).values() if layers is None else map(denoiser.get_submodule, layers)
        )
        shapes = [tuple(layer.weight.shape) for layer in found]
        width = pooled if layers and layers != spaces[0] else shapes[0][1]
        count = 1 if width == pooled and layers != spaces[0] else length
        weights = [draw(rows, width) / width**0.5 for rows, _ in shapes]
        old, new, *kept = (draw(count, width).double() for _ in range(4))
        start = min(2, count - 1)
        given.append((weights, Rows(old[start:], new[start:], torch.cat(kept), {})))
    before = peak()
    seconds = min((once(given) for _ in range(REPEATS)), key=lambda one: one["solve"] + one["apply"])
    return {
        "family": family,
        "weights": sum(len(weights) for weights, _ in given),
        "widths": [rows.sources.shape[1] for _, rows in given],
        "rows": [len(rows.sources) for _, rows in given],
        "preserved": [len(rows.preserved) for _, rows in given],
        "parameters": sum(weight.numel() for weights, _ in given for weight in weights),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "beyond_mb": round(peak() - before),
    }


def once(given: list) -> dict[str, float]:
    """Seconds of each phase, all spaces together."""
    seconds = dict.fromkeys(("solve", "apply", "store"), 0.0)
    for weights, rows in given:
        times = [time.perf_counter()]
        t = uce.solve(rows, uce.Config())
        times.append(time.perf_counter())
        for weight in weights:
            t.apply_to_weight(weight)
        times.append(time.perf_counter())
        t.compressed(rtol=1e-7)
        times.append(time.perf_counter())
        for name, start, stop in zip(seconds, times, times[1:], strict=False):
            seconds[name] += stop - start
    return seconds


def peak() -> float:
    """Peak memory of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = []
    for family in FAMILIES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(cell, (family,)))
        print(json.dumps(rows[-1]), flush=True)
    details = {
        "threads": torch.get_num_threads(),
        "note": "random weights and rows at true shapes: timings, not results",
        "diffusers": diffusers.__version__,
        "cells": rows,
    }
    command = f"python benchmarks/text_entries.py --out {given.out.as_posix()}"
    save(Result(command, "benchmark", machine=machine(), details=details), given.out)


if __name__ == "__main__":
    main()
