#!/usr/bin/env bash
# A pipeline of latents is saved with DPM-Solver++ (or Euler, or UniPC) and later turned to DDIM in the documented way,
# DDIMScheduler.from_config(pipeline.scheduler.config). Expected: the same noise schedule and a sampler that ends where
# its noise predictions point to. Seen: those configs have no clip_sample, DDIM's own default is to clip to [-1, 1], so
# latents, which reach +-4, are cut without a word; a config that once was DDIM's or PNDM's of Stable Diffusion carries
# clip_sample=False along and is not cut. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy diffusers==0.42.1
cat > "$place/clipped.py" <<'PY'
import sys

import diffusers
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
wanted = 4 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def missed(scheduler: DDIMScheduler) -> float:
    """Largest distance from `wanted` after ten steps with the very noise that stands between x and `wanted`."""
    scheduler.set_timesteps(10)
    x = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod[t]
        x = scheduler.step((x - a.sqrt() * wanted) / (1 - a).sqrt(), t, x).prev_sample
    return float((x - scheduler.final_alpha_cumprod.sqrt() * wanted).abs().max())


print(f"diffusers {diffusers.__version__}, torch {torch.__version__}; expected: about 0 in every row")
found = {"made as DDIM, clip_sample=False": missed(DDIMScheduler(**schedule, clip_sample=False))}
for cls in (DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler):
    found[f"from the config of {cls.__name__}"] = missed(DDIMScheduler.from_config(cls(**schedule).config))
there = DPMSolverMultistepScheduler.from_config(DDIMScheduler(**schedule, clip_sample=False).config)
found["there and back from DDIM"] = missed(DDIMScheduler.from_config(there.config))
for name, distance in found.items():
    print(f"{name:45} misses by {distance:.3f}")
right = [found["made as DDIM, clip_sample=False"], found["there and back from DDIM"]]
cut = [distance for name, distance in found.items() if name.startswith("from the config")]
sys.exit(not (max(right) < 0.5 < 1 < min(cut)))
PY
"$place/env/bin/python" "$place/clipped.py"
