#!/usr/bin/env bash
# Training, attacks and losses make x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise with scheduler.add_noise(x_0, noise, t).
# Expected: t alone says how much noise, as with DDPM and DDIM, so that the pipeline's own scheduler may be taken for it.
# Seen with DPM-Solver++ (several steps, single step), UniPC and DEIS: a new scheduler reads its levels backwards, t = 301
# gets the noise of t = 698; after set_timesteps, which each drawn picture calls, every t that is not one of those few
# steps gets the noise of the last of them, which is next to none, and the amount depends on how many steps were drawn
# before. No warning either way, and a t of the schedule is right, so that image-to-image is. Euler and LMS have another
# scale (x_0 is not scaled) and raise an IndexError for such a t. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy diffusers==0.42.1
cat > "$place/noised.py" <<'PY'
import sys
import warnings

import diffusers
import torch

schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
x, noise = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
abar = diffusers.DDPMScheduler(**schedule).alphas_cumprod


def amounts(scheduler, t: int) -> list[float]:
    """How much of x_0 and of the noise are in x_t."""
    with warnings.catch_warnings(action="error"):
        noisy = scheduler.add_noise(x, noise, torch.tensor([t]))
    return [round(float(one), 3) for one in noisy.flatten()]


def due(t: int) -> list[float]:
    return [round(float(one), 3) for one in (abar[t].sqrt(), (1 - abar[t]).sqrt())]


print(f"diffusers {diffusers.__version__}, torch {torch.__version__}; of x_0 and of the noise at t = 301")
print(f"{'expected in every place':33} {due(301)}")
found = {}
for name in ("DDPM", "DDIM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep"):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**schedule)
    found[name] = [amounts(scheduler, 301)]
    for steps in (50, 20):
        scheduler.set_timesteps(steps)
        found[name].append(amounts(scheduler, 301))
    planned = int(scheduler.timesteps[7])
    print(f"{name:33} new {found[name][0]}, after 50 steps {found[name][1]}, after 20 {found[name][2]}; "
          f"at t = {planned} of the 20: {amounts(scheduler, planned)} of {due(planned)}")
    assert all(abs(a - b) < 2e-3 for a, b in zip(amounts(scheduler, planned), due(planned)))
print(f"due at t = 698: {due(698)}")
right = all(one == due(301) for name in ("DDPM", "DDIM") for one in found.pop(name))
wrong = all(new == due(698) and fifty[1] < twenty[1] < 0.25 for new, fifty, twenty in found.values())
sys.exit(not (right and wrong))
PY
"$place/env/bin/python" "$place/noised.py"
