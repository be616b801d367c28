"""How fast are UCE and RECE as one matrix, against the loop over layers that the formulas spell out?

    python benchmarks/closed_form.py --out data/results/benchmark_closed_form.json

Random key and value weights at the true shapes of Stable Diffusion 1.4, 2.1 and SDXL, random text embeddings of the
size real ones have: a timing, never a result. Both ways do the same work in float64, on the same weights, in the same
process. The literal way goes through the layers one by one, sums every prompt's outer products anew for each of them,
and inverts; where it would take longer than --budget seconds it stops after some layers, and its time is scaled by
the layers' share of the arithmetic ("literal_measured_share" below 1 says so). The loop ends with new weights, and so
"speedup" counts our fit and applying it to the weights; "speedup_fit" counts the fit, which is what `fit` does.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from erasekit import closed_form
from erasekit.closed_form import ContextMap
from erasekit.evaluate.records import Result, save
from erasekit.evaluate.runs import machine
from erasekit.layers import cross_attention_kv
from erasekit.methods import rece, uce

LENGTH = 77
NORM = 27.0  # length of a token embedding of Stable Diffusion 1.4, roughly
SHAPES = {
    "sd14": dict(
        block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ),
    "sd21": dict(
        block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, use_linear_projection=True,
    ),
    "sdxl": dict(
        block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 10),
    ),
}  # fmt: skip
CONFIG = rece.Config()
UCE = (CONFIG.start.erase_scale, CONFIG.start.preserve_scale, CONFIG.start.lam)
ROUND = (CONFIG.erase_scale, CONFIG.lambda_1, CONFIG.lambda_2)


def weights(family: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random float32 key and value weights of the real UNet's shapes."""
    with torch.device("meta"):
        layers = cross_attention_kv(UNet2DConditionModel(**SHAPES[family]))
    draw = lambda shape: torch.randn(shape, generator=generator) / shape[1] ** 0.5
    return {name: draw(tuple(layer.weight.shape)) for name, layer in layers.items()}


def prompts(count: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 77, d): a start row and padding that are alike in every prompt, as in CLIP, and a part of its own."""
    shared = torch.randn(1, LENGTH, d, generator=generator)
    own = torch.randn(count, LENGTH, d, generator=generator)
    own[:, 0] = 0
    return (shared + 0.5 * own) * (NORM / (1.25 * d) ** 0.5)


# ---- one matrix -----------------------------------------------------------------------------------------------


def one_matrix(ws, c, c_star, kept, epochs: int) -> tuple[ContextMap, dict[str, float]]:
    """UCE and `epochs` rounds in d dimensions; seconds of each phase."""
    seconds = {}
    with clock(seconds, "condense"):
        kept = closed_form.condensed(kept)
    with clock(seconds, "gram"):
        gram = closed_form.weight_gram(ws.values()) if epochs else None
    with clock(seconds, "solve"):
        given = closed_form.Rows(c, c_star, kept, {})
        t = uce.solve(given, CONFIG.start)
        for _, after in rece.rounds(t, gram, given, kept, replace(CONFIG, epochs=epochs)):
            t = after
    return t, seconds


def apply(ws, t) -> tuple[list[torch.Tensor], dict[str, float]]:
    """The new weights; seconds."""
    seconds = {}
    with clock(seconds, "apply"):
        new = [t.apply_to_weight(w) for w in ws.values()]
    return new, seconds


# ---- the literal loop -----------------------------------------------------------------------------------------


def literal_erase(w, c, c_star, kept, scales):
    """M_num M_den^-1 for one weight; c, c_star, kept: lists of prompts (rows, d)."""
    e, p, ridge = scales
    numerator, denominator = ridge * w, ridge * torch.eye(w.shape[1], dtype=torch.float64)
    for old, new in zip(c, c_star, strict=True):
        numerator = numerator + e * (w @ new.T) @ old
        denominator = denominator + e * old.T @ old
    for rows in kept:
        numerator = numerator + p * (w @ rows.T) @ rows
        denominator = denominator + p * rows.T @ rows
    return numerator @ torch.linalg.inv(denominator)


def literal_derive(old, new, c, lam):
    """(lam I + sum W_new^T W_new)^-1 (sum W_new^T W_old) c for every prompt by itself."""
    derived = []
    for rows in c:
        left = lam * torch.eye(rows.shape[1], dtype=torch.float64)
        right = torch.zeros_like(left)
        for name in old:
            left = left + new[name].T @ new[name]
            right = right + new[name].T @ old[name]
        derived.append((torch.linalg.inv(left) @ right @ rows.T).T)
    return derived


def literal(ws, c, c_star, kept, epochs: int, budget: float):
    """New weights of the layers there was time for, seconds for all of them, and the share that was measured."""
    old = {name: w.double() for name, w in ws.items()}
    work = {name: 2 * w.shape[0] + w.shape[1] for name, w in ws.items()}
    new, start = {}, time.perf_counter()
    for name, w in sorted(old.items(), key=lambda item: work[item[0]]):
        new[name] = literal_erase(w, c, c_star, kept, UCE)
        if not epochs and time.perf_counter() - start > budget:
            break
    for _ in range(epochs):
        derived = literal_derive(old, new, c, CONFIG.lam)
        new = {name: literal_erase(w, derived, c_star, kept, ROUND) for name, w in new.items()}
    share = sum(work[name] for name in new) / sum(work.values())
    return new, (time.perf_counter() - start) / share, share


# ---- a cell ---------------------------------------------------------------------------------------------------


class clock:
    """Add the seconds of a block to seconds[name]."""

    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *error):
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start


def fastest(run: Callable, repeats: int):
    """The run whose phases took the least time together."""
    return min((run() for _ in range(repeats)), key=lambda found: sum(found[1].values()))


def cell(family: str, concepts: int, preserved: int, epochs: int, budget: float, compare: bool) -> dict:
    """One row of the table."""
    generator = torch.Generator().manual_seed(0)
    ws = weights(family, generator)
    d = next(iter(ws.values())).shape[1]
    blocks = prompts(concepts + 1 + preserved, d, generator)
    c = [block.double() for block in blocks[:concepts]]
    c_star = [blocks[concepts].double()] * concepts
    kept = blocks[concepts + 1 :]

    rows = torch.cat(c), torch.cat(c_star), kept.flatten(0, 1)
    t, seconds = fastest(lambda: one_matrix(ws, *rows, epochs), 5)
    seconds |= fastest(lambda: apply(ws, t), 5)[1]
    with clock(seconds, "save"), tempfile.TemporaryDirectory() as folder:
        small = t.compressed(rtol=1e-7)
        tensors = {"left": small.left.float().contiguous(), "right": small.right.float().contiguous()}
        save_file(tensors, Path(folder) / "edit.safetensors")
    row = {
        "family": family,
        "method": f"UCE + {epochs} rounds of RECE" if epochs else "UCE",
        "concepts": concepts,
        "preserved": preserved,
        "d": d,
        "projections": len(ws),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "fit_seconds": round(sum(seconds[name] for name in ("condense", "gram", "solve")), 4),
        "rank": small.rank,
        "artefact_bytes": small.rank * d * 8,
        "bytes_per_row": d * 8,
        "projection_bytes": sum(w.nbytes for w in ws.values()),
    }
    if compare:
        new, literal_seconds, share = literal(
            ws, c, c_star, [block.double() for block in kept], epochs, budget
        )
        worst = max(
            float((t.apply_to_weight(ws[name].double()) - w).norm() / w.norm()) for name, w in new.items()
        )
        row |= {
            "literal_seconds": round(literal_seconds, 2),
            "literal_measured_share": round(share, 3),
            "speedup_fit": round(literal_seconds / row["fit_seconds"], 1),
            "speedup": round(literal_seconds / (row["fit_seconds"] + seconds["apply"]), 1),
            "relative_error": worst,
        }
    row["peak_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return row


def encoding(count: int = 32) -> dict:
    """Seconds per prompt of a text encoder of Stable Diffusion 1.4's shape, one prompt at a time and in batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        ).eval()
    ids = torch.randint(1000, 40000, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    times = {}
    with torch.no_grad():
        encoder(ids[:1])
        for name, size in (("one_at_a_time", 1), ("batches_of_16", 16)):
            with clock(times, name):
                for part in ids.split(size):
                    encoder(part)
    return {name: round(value / count, 4) for name, value in times.items()}


# (family, concepts, preserved prompts, rounds of RECE, compare with the literal loop)
CELLS = [
    ("sd14", 1, 1, 3, True),
    ("sd14", 10, 1, 3, False),
    ("sd14", 100, 1, 3, False),
    ("sd14", 1, 1, 0, True),
    ("sd14", 1, 100, 0, True),
    ("sd14", 1, 1000, 0, True),
    ("sd14", 10, 100, 0, True),
    ("sd14", 100, 1000, 0, True),
    ("sd14", 1, 1000, 3, False),
    ("sd21", 1, 1, 0, True),
    ("sd21", 1, 1, 3, True),
    ("sd21", 1, 1000, 0, True),
    ("sdxl", 1, 1, 0, True),
    ("sdxl", 1, 1, 3, False),
    ("sdxl", 1, 1000, 0, True),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--budget", type=float, default=40.0, help="seconds for one literal UCE before it is scaled"
    )
    given = parser.parse_args()
    rows = []
    for family, concepts, preserved, epochs, compare in CELLS:
        if family in given.families:
            rows.append(cell(family, concepts, preserved, epochs, given.budget, compare))
            print(json.dumps(rows[-1]), flush=True)
    details = {
        "threads": torch.get_num_threads(),
        "note": "random weights at true shapes: timings, not results",
        "encode_seconds_per_prompt": encoding(),
        "cells": rows,
    }
    command = f"python benchmarks/closed_form.py --out {given.out.as_posix()}"
    save(Result(command, "benchmark", machine=machine(), details=details), given.out)


if __name__ == "__main__":
    main()
