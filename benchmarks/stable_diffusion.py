"""Seconds and peak memory of the methods at the true shapes of Stable Diffusion 1.4, 2.1 and SDXL, with random weights.

    python benchmarks/stable_diffusion.py --out data/results/benchmark_stable_diffusion.json
    python benchmarks/stable_diffusion.py --device cuda --out build/stable_diffusion_cuda.json
    python benchmarks/stable_diffusion.py --trained --half --out data/results/benchmark_memory.json

A timing, never a result. The pipelines are made of the real classes, from the shapes below, and saved once below
build/stable_diffusion/ (4 GB, 5 GB and 7 GB). The tokenizer is the emoji world's, with 77 positions: a real CLIP
vocabulary does not come with this repository, its table of 49,408 embeddings does have the true size. Every row runs
in a process of its own, so that its peak memory is its own, and is written when it is done: a kill costs one row, and
the next call makes the rows that are missing.

Of training, one update is measured, through the public `fit` with one iteration. A latent through the UNet is "free"
where no gradient is wanted and "trained" where it goes through forward and backward. `latents` counts both for any
settings, and so the time of a whole recipe is estimated from the two speeds that its row measured.

On the CPU every time is given twice: by the clock ("seconds"), and as processor time divided by the number of threads
("cpu_seconds"), which is what the clock would show at least on cores that have nothing else to do. Speeds and estimates
there are of the latter; on an accelerator, of the clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from closed_form import SHAPES
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import erasekit as ek
from erasekit import tuning
from erasekit.concepts import Concept
from erasekit.evaluate.records import Result, read, save
from erasekit.evaluate.runs import machine, peak_memory_mb
from erasekit.paths import BUILD, EMOJI_MODEL, write_atomically

LENGTH = 77
NOISE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
TEXT = {  # width, layers, heads and activation of the text encoders
    "sd14": [(768, 12, 12, "quick_gelu")],
    "sd21": [(1024, 23, 16, "gelu")],
    "sdxl": [(768, 12, 12, "quick_gelu"), (1280, 32, 20, "gelu")],
}
POOLED = dict(addition_embed_type="text_time", addition_time_embed_dim=256,
              projection_class_embeddings_input_dim=2816)  # fmt: skip
SIDE = {"sd14": 64, "sd21": 96, "sdxl": 128}  # of the latents


# ---- pipelines of the true shape --------------------------------------------------------------------------------


def tokenizer() -> CLIPTokenizer:
    """The emoji world's, as long as CLIP's."""
    return CLIPTokenizer.from_pretrained(EMOJI_MODEL / "tokenizer", model_max_length=LENGTH)


def pipeline(family: str) -> DiffusionPipeline:
    """Random weights at the shapes of "sd14", "sd21" or "sdxl", in the default dtype of torch."""
    words = tokenizer()
    ends = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    encoders = []
    for width, layers, heads, activation in TEXT[family]:
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            hidden_act=activation, projection_dim=width, max_position_embeddings=LENGTH, **ends,
        )  # fmt: skip
        encoders.append((CLIPTextModelWithProjection if encoders else CLIPTextModel)(config))
    extra = POOLED if family == "sdxl" else {}
    unet = UNet2DConditionModel(sample_size=SIDE[family], **SHAPES[family], **extra)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=8 * SIDE[family],
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    with torch.device("cpu"):
        scheduler = {
            "sd14": lambda: PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **NOISE),
            "sd21": lambda: DDIMScheduler(
                prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **NOISE
            ),
            "sdxl": lambda: EulerDiscreteScheduler(**NOISE),
        }[family]()
    parts = dict(unet=unet, vae=vae, text_encoder=encoders[0], tokenizer=words, scheduler=scheduler)
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            **parts, text_encoder_2=encoders[1], tokenizer_2=tokenizer(), add_watermarker=False
        )
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def folder(family: str) -> Path:
    return BUILD / "stable_diffusion" / family


def build(family: str) -> None:
    """Save the pipeline, whole or not at all. SDXL in half precision: 14 GB else."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16 if family == "sdxl" else torch.float32)
    made = pipeline(family)
    torch.set_default_dtype(torch.float32)
    folder(family).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder(family).parent) as place:
        made.save_pretrained(Path(place) / family)
        (Path(place) / family).rename(folder(family))


# ---- what training costs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents:
    """Latents through the UNet: in the set-up, and per iteration, without and with a gradient."""

    set_up: float
    free: float
    trained: float


def steps(sampler: int, rows: int) -> float:
    """Expected steps until the furthest of so many rows, each at a node drawn uniformly; at least one."""
    least = (1 / sampler) ** rows
    return sum(1 - (k / sampler) ** rows for k in range(1, sampler)) + least


def latents(method: str, config, prompts: int, kept: int = 0) -> Latents:
    """What a `fit` of ESD, AdvUnlearn, TRCE (stage 2), RealEra or MACE (LoRA, one concept) puts through the UNet.

    prompts: to be erased (TRCE: malicious, in their templates). kept: retained ones of AdvUnlearn.
    """
    b = getattr(config, "batch", 1)
    if method in ("esd", "advunlearn"):
        cached = config.states == "cached"
        state = lambda n: 0 if cached else 2 * n * (steps(config.sampler, n) + 1)
        ways = (prompts + kept) * config.noises if cached else 0
        whole = ways * config.sampler * 2
        if method == "esd":
            return Latents(whole, state(b), b)
        attacked = max(0, config.iterations - config.warmup) / config.iterations * config.attack_steps
        r = config.retain_batch if kept else 0
        return Latents(whole, attacked * state(b) + state(b) + state(r), attacked * b + b + r)
    if method == "trce":
        held = (
            config.reference == "stage1" and config.stages == "both"
        )  # predicted anew on the unconditional ways
        whole = prompts * config.noises * config.early * 3 + config.calm * config.sampler * (1 + held)
        hinged = b * (2 if config.branches == "both" else 1)
        return Latents(whole, 0, hinged + config.keep_batch)
    if method == "realera":
        n, m = config.lora_n * config.neighbour, config.lora_m * config.beyond
        return Latents(prompts * config.noises * config.sampler * 2, b * (1 + m), b * (1 + n + m))
    if method == "mace":
        return Latents(config.pictures * config.sampler * 2, 0, b)
    raise ValueError(f"no count for {method!r}")


class Meter:
    """Counts latents and clocks those without a gradient, in every UNet; `marks` are taken at the start of the training
    loop and after each iteration.
    """

    def __init__(self):
        self.free = self.trained = 0
        self.free_seconds = np.zeros(2)
        self.marks: list[dict] = []

    def __enter__(self):
        forward, optimize = UNet2DConditionModel.forward, tuning.optimize

        def counted(unet, sample, *args, **kwargs):
            if torch.is_grad_enabled():
                self.trained += len(sample)
                return forward(unet, sample, *args, **kwargs)
            begin = now()
            out = forward(unet, sample, *args, **kwargs)
            self.free += len(sample)
            self.free_seconds += now() - begin
            return out

        def begun(*args, **kwargs):
            self.mark()
            return optimize(*args, **kwargs)

        self.patches = [
            patch.object(UNet2DConditionModel, "forward", counted),
            patch.object(tuning, "optimize", begun),
        ]
        for one in self.patches:
            one.start()
        self.mark()
        return self

    def __exit__(self, *_):
        for one in self.patches:
            one.stop()

    def mark(self, state: dict | None = None) -> None:
        """For `callback` as well: TRCE, RealEra and MACE call it before the training, with step -1."""
        if state is None or state["step"] >= 0:
            kept = dict(free=self.free, trained=self.trained, free_seconds=self.free_seconds.copy())
            self.marks.append({"seconds": now(), **kept})

    def between(self, first: int, second: int) -> dict:
        return {key: self.marks[second][key] - value for key, value in self.marks[first].items()}


def now() -> np.ndarray:
    """Clock, and processor time divided by the number of threads, in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time() / torch.get_num_threads()])


def memory_mb(what: str) -> int | None:
    """VmRSS, the memory that this process holds, or VmHWM, the most it has held; None where Linux does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((round(int(line.split()[1]) / 1024) for line in lines if line.startswith(f"{what}:")), None)


def peak_from_now() -> int | None:
    """Let VmHWM begin anew; returns what is held, weights and libraries."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


# ---- rows -------------------------------------------------------------------------------------------------------

PHRASES = 20  # of one malicious concept in TRCE's code
CLOSED = {
    "UCE": ("uce", "sd14-nudity", {}),
    "RECE": ("rece", "sd14-nudity", {}),
    "MACE, closed form": ("mace", "sd14-nudity", {"lora": False}),
    # 0, the preset's lam, is singular on random weights
    "TRCE, stage 1": ("trce", "sd14-nudity", {"stages": "text", "lam": 1e-6}),
}
OTHERS = {  # what the four papers are compared with
    "SPEED": ("speed", "sd14-nudity", {}),
    "DP": ("dp", "sd14-object", {}),
    "OCE": ("oce", "sd14-nudity", {}),
}
FILTERS = {
    "AdaVD": "adavd",
    "Semantic Surgery": "semantic_surgery",
    "SAFREE": "safree",
    "SLD": "sld",
}
# preset, what is smaller than in it for the measurement, and what is smaller still on the CPU; `latents` of the preset
TRAINED = {
    "ESD-x": ("esd", "sd14-artist", dict(states="cached", noises=1, sampler=1), {}, dict(prompts=1)),
    "AdvUnlearn": (
        "advunlearn", "sd14-nudity",
        dict(warmup=0, attack_steps=1, states="cached", noises=1, sampler=1), dict(retain_batch=1),
        dict(prompts=1, kept=80),
    ),
    "TRCE, stage 2": (
        "trce", "sd14-nudity", dict(stages="trajectory", sampler=1, early=1, noises=1, calm=1),
        dict(keep_batch=1), dict(prompts=PHRASES),
    ),
    "RealEra, LoRA": (
        "realera", "sd14-object", dict(sampler=1, noises=1, templates=("{}",)), dict(lora_n=1, lora_m=1),
        dict(prompts=3),
    ),
    "MACE, LoRA": ("mace", "sd14-object", dict(sampler=1, pictures=1), {}, {"prompts": 1}),
}  # fmt: skip
# Three UNets and two whole pipelines: 12 GB in single precision before the first activation.
HALVED = ("TRCE, stage 2", "RealEra, LoRA", "MACE, LoRA")

ROWS = [
    ("sd14", "load"),
    ("sd14", "UCE"),
    *(
        ("sd14", name)
        for name in ("ESD-x", "TRCE, stage 2", "AdvUnlearn", "RealEra, LoRA", "sampling", "MACE, LoRA")
    ),
    *(("sd14", name) for name in CLOSED if name != "UCE"),
    *(("sd14", name) for name in (*OTHERS, *FILTERS)),
    *((family, name) for family in ("sd21", "sdxl") for name in ("load", *CLOSED)),
    *(("sdxl", name) for name in TRAINED),
]


def row(family: str, name: str, device: str, place: Path, half: bool = False) -> dict:
    """One row of the table, measured in this process. half: in bfloat16, as those that need it are anyway."""
    begin = now()
    half = half or family == "sdxl" or name in HALVED
    dtype = "auto" if device != "cpu" else "bfloat16" if half else "float32"
    model = ek.load(folder(family), device=device, dtype=dtype)
    seconds = {"load": now() - begin}
    begin = now()
    model.fingerprint()
    seconds["fingerprint"] = now() - begin
    found: dict = {"dtype": str(model.dtype).removeprefix("torch.")}
    if name == "load":
        parts = ("unet", "vae", "text_encoder", "text_encoder_2")
        modules = {part: getattr(model.pipeline, part, None) for part in parts}
        found["parameters"] = {
            k: sum(p.numel() for p in m.parameters()) for k, m in modules.items() if m is not None
        }
    elif name == "sampling":
        found |= sampling(model, seconds)
    elif name in FILTERS:
        found |= filtered(model, FILTERS[name], seconds)
    elif name in CLOSED or name in OTHERS:
        found |= closed(model, *(CLOSED | OTHERS)[name], PHRASES if family == "sd14" else 2, seconds)
    else:
        found |= trained(model, *TRAINED[name], device == "cpu", place, seconds)
    found["seconds"] = {key: round(float(value[0]), 2) for key, value in seconds.items()}
    if device == "cpu":
        found["cpu_seconds"] = {key: round(float(value[1]), 2) for key, value in seconds.items()}
    found["peak_memory_mb"] = peak_memory_mb()
    if device != "cpu":
        found["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)
    return found


def sampling(model, seconds: dict) -> dict:
    """One guided picture of two steps, and what a picture of 50 takes at that pace."""
    marks = [now()]
    model.generate(["a church"], seeds=[0], steps=2, guidance=7.5, callback=lambda _: marks.append(now()))
    end = now()
    seconds["guided_step"] = (marks[-1] - marks[1]) / (len(marks) - 2)
    seconds["decode"] = end - marks[-1]
    whole = 51 * seconds["guided_step"] + seconds["decode"]  # PNDM takes one step more
    return {"estimate": {"picture_of_50_steps": round(told(whole, model), 1)}}


def told(times: np.ndarray, model) -> float:
    """The one of the two times that estimates are made of."""
    return float(times[1 if model.device.type == "cpu" else 0])


def filtered(model, method: str, seconds: dict) -> dict:
    """The same picture while a filter is at work, which is made first."""
    begin = now()
    edit = getattr(ek, method).fit(model, "church")
    seconds["fit"] = now() - begin
    with edit.applied(model):
        return {"preset": "sd14-object", "edit_bytes": edit.nbytes} | sampling(model, seconds)


def closed(model, method: str, preset: str, changes: dict, phrases: int, seconds: dict) -> dict:
    """A fit by a preset of the method: no iteration, so the whole recipe. What is erased is harmless, and TRCE maps as
    many phrases of it as said.
    """
    module = getattr(ek, method)
    erase = (
        Concept("church", synonyms=tuple(f"house {i}" for i in range(1, phrases)))
        if method == "trce"
        else "church"
    )
    begin = now()
    edit = module.fit(model, erase, config=replace(module.PRESETS[preset], **changes))
    seconds["fit"] = now() - begin
    begin = now()
    with edit.applied(model):
        seconds["apply"] = now() - begin
        begin = now()
    seconds["undo"] = now() - begin
    found = {"preset": preset, "edit_bytes": edit.nbytes}
    found |= {"rank": edit.context_map.rank} if edit.kind == "context_map" else {}
    return found | ({"phrases": phrases} if method == "trce" else {})


def trained(
    model,
    method: str,
    preset: str,
    smaller: dict,
    smaller_cpu: dict,
    counts: dict,
    cpu: bool,
    place: Path,
    seconds,
) -> dict:
    """One iteration by `fit`, set-up and iteration clocked apart, and the estimate for the preset."""
    module = getattr(ek, method)
    whole = module.PRESETS[preset]
    changes = smaller | (smaller_cpu if cpu else {})
    config = replace(whole, iterations=1, **changes)
    keep = ["house", "castle", "dog", "cat", "horse"][: config.retain_batch] if method == "advunlearn" else ()
    begin, loaded = now(), peak_from_now()
    with Meter() as meter:
        module.fit(model, "church", keep, config=config, callback=meter.mark, folder=place)
    seconds["fit"] = now() - begin
    memory = {"loaded": loaded, "fit": memory_mb("VmHWM")} if cpu else {}
    set_up, one = meter.between(0, 1), meter.between(1, 2)
    seconds |= {"set_up": set_up["seconds"], "iteration": one["seconds"]}
    training = one["seconds"] - one["free_seconds"]
    pace = {
        "free": told(meter.free_seconds, model) / meter.free,
        "trained": told(training, model) / one["trained"],
    }
    cost = latents(method, whole, **counts)
    iteration = cost.free * pace["free"] + cost.trained * pace["trained"]
    set_up_seconds = told(set_up["seconds"] - set_up["free_seconds"], model) + cost.set_up * pace["free"]
    return {
        "preset": preset,
        "smaller": changes,
        "memory_mb": memory,
        "measured": {"set_up": set_up["free"], "free": one["free"], "trained": one["trained"]},
        "seconds_per_latent": {key: round(value, 4) for key, value in pace.items()},
        "estimate": {
            "iteration": round(iteration, 1),
            "set_up": round(set_up_seconds),
            "hours": round((set_up_seconds + whole.iterations * iteration) / 3600, 2),
        },
    }


def recipes() -> dict[str, dict]:
    """Latents through the UNet of each preset that `TRAINED` names: the same on any machine."""
    found = {}
    for name, (method, preset, _, _, counts) in TRAINED.items():
        config = getattr(ek, method).PRESETS[preset]
        cost = {key: round(value, 1) for key, value in vars(latents(method, config, **counts)).items()}
        found[name] = {"method": method, "preset": preset, "iterations": config.iterations, **cost}
    return found


# ---- the table --------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--families", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--trained", action="store_true", help="the methods that train, of SDXL too")
    parser.add_argument("--half", action="store_true", help="in bfloat16, on the CPU as well")
    parser.add_argument("--note", default="", help="for the file: what else the machine was doing")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--build", choices=SHAPES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build:
        build(given.build)
        return
    if given.row:
        with tempfile.TemporaryDirectory() as place:
            found = row(*given.row, given.device, Path(place), given.half)
        write_atomically(given.out, json.dumps(found))
        return
    details = {
        "what": "random weights at true shapes: timings, not results",
        "note": given.note,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
        "recipes": recipes(),
        "rows": read(given.out).details["rows"] if given.out.exists() else {},
    }
    flags = "".join(f" --{name}" for name in ("trained", "half") if getattr(given, name))
    flags += f" --families {' '.join(given.families)}" if given.families != list(SHAPES) else ""
    command = (
        f"python benchmarks/stable_diffusion.py{flags} --device {given.device} --out {given.out.as_posix()}"
    )
    result = Result(command, "benchmark", machine=machine(), details=details)
    again = [sys.executable, __file__, "--device", given.device, *(["--half"] if given.half else []), "--out"]
    passive = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # a thread that waits takes no processor time
    part = given.out.with_suffix(".row.json")
    for family, name in ROWS:
        label = f"{family}: {name}"
        if family not in given.families or label in details["rows"]:
            continue
        if name not in TRAINED if given.trained else (family == "sdxl" and name in TRAINED):
            continue
        if not folder(family).exists():
            subprocess.run([*again, os.devnull, "--build", family], check=True)
        subprocess.run([*again, str(part), "--row", family, name], check=True, env=passive)
        details["rows"][label] = json.loads(part.read_text())
        part.unlink()
        print(label, json.dumps(details["rows"][label]), flush=True)
        save(result, given.out)
    # order of the table, whatever was made when
    order = [f"{family}: {name}" for family, name in ROWS]
    details["rows"] = {label: details["rows"][label] for label in order if label in details["rows"]}
    save(result, given.out)


if __name__ == "__main__":
    main()
