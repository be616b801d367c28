#!/usr/bin/env bash
# A picture is drawn with generator=torch.Generator().manual_seed(0), so that it can be drawn again. Expected: all noise of
# the call comes from it. Seen, without a warning: DPM-Solver++ SDE (the "DPM++ SDE" of web UIs) in a Stable Diffusion
# pipeline takes the noise it adds at each step from torch's global state, and with noise_sampler_seed set, a noise for
# each place in the batch, whatever the generators are; the pipelines of Stable Diffusion 3 and FLUX (most with a
# transformer) do not hand the generator on, so FlowMatchEuler with stochastic_sampling and FlowMatchLCM, as distilled
# models use them, draw another picture every time. Controls:
# Euler ancestral, DDIM with eta 1 and DPM-Solver++ with algorithm_type sde-dpmsolver++ are the generator's. Exits 1 if
# that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check \
    torch==2.13.0 numpy scipy diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 torchsde==0.2.6
cat > "$place/again.py" <<'PY'
import sys
from importlib.metadata import version

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

diffusers.utils.logging.set_verbosity_error()
text = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
pooled = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
torch.manual_seed(0)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, shift_factor=0.0).eval()
unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
    norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()
sd3 = SD3Transformer2DModel(
    sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
    num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
).eval()
flux = FluxTransformer2DModel(
    patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
).eval()


def pipeline(kind: str, scheduler):
    parts = dict(vae=vae, scheduler=scheduler, text_encoder=None, tokenizer=None)
    second = dict(text_encoder_2=None, tokenizer_2=None)
    if kind == "SD 1":
        made = StableDiffusionPipeline(
            **parts, unet=unet, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    elif kind == "SD 3":
        made = StableDiffusion3Pipeline(**parts, **second, transformer=sd3, text_encoder_3=None, tokenizer_3=None)
    else:
        made = FluxPipeline(**parts, **second, transformer=flux)
    made.set_progress_bar_config(disable=True)
    return made


def latents(kind: str, scheduler, pictures: int = 1, **more) -> torch.Tensor:
    """The last picture of some, each with a generator of its own, new in every call: of seed 0."""
    given = dict(prompt_embeds=text[:1].repeat(pictures, 1, 1), num_inference_steps=6, output_type="latent")
    if kind != "SD 1":
        given |= dict(pooled_prompt_embeds=pooled[:1].repeat(pictures, 1))
    generators = [torch.Generator().manual_seed(seed) for seed in reversed(range(pictures))]
    made = pipeline(kind, scheduler)
    side = 8 * made.vae_scale_factor * (2 if kind == "FLUX" else 1)
    return made(**given, generator=generators, guidance_scale=1.0, height=side, width=side, **more).images[-1].double()


schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
cases = {
    "SD 1, Euler ancestral": ("SD 1", diffusers.EulerAncestralDiscreteScheduler(**schedule), {}),
    "SD 1, DDIM with eta 1": ("SD 1", diffusers.DDIMScheduler(**schedule, clip_sample=False, steps_offset=1), {"eta": 1.0}),
    "SD 1, sde-dpmsolver++": (
        "SD 1", diffusers.DPMSolverMultistepScheduler(**schedule, algorithm_type="sde-dpmsolver++"), {}
    ),
    "SD 1, DPM-Solver++ SDE": ("SD 1", diffusers.DPMSolverSDEScheduler(**schedule), {}),
    "SD 1, the same, noise_sampler_seed 0": (
        "SD 1", diffusers.DPMSolverSDEScheduler(**schedule, noise_sampler_seed=0), {}
    ),
    "SD 3, FlowMatchEuler": ("SD 3", diffusers.FlowMatchEulerDiscreteScheduler(), {}),
    "SD 3, the same, stochastic_sampling": (
        "SD 3", diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}
    ),
    "SD 3, FlowMatchLCM": ("SD 3", diffusers.FlowMatchLCMScheduler(), {}),
    "FLUX, FlowMatchEuler": ("FLUX", diffusers.FlowMatchEulerDiscreteScheduler(), {}),
    "FLUX, the same, stochastic_sampling": (
        "FLUX", diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}
    ),
    "FLUX, FlowMatchLCM": ("FLUX", diffusers.FlowMatchLCMScheduler(), {}),
}
print(", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "torchsde")))
print("share by which the latents of one seed change; 0 expected in every row")
again, beside = {}, {}
for name, (kind, scheduler, more) in cases.items():
    one = latents(kind, scheduler, **more)
    size = one.norm()
    again[name] = float((latents(kind, scheduler, **more) - one).norm() / size)
    beside[name] = float((latents(kind, scheduler, pictures=2, **more) - one).norm() / size)
    print(f"{name:38} drawn again {again[name]:.4f}   after another {beside[name]:.4f}")
from_the_state = ["SD 1, DPM-Solver++ SDE", *(name for name in cases if name.endswith(("stochastic_sampling", "LCM")))]
from_the_batch = "SD 1, the same, noise_sampler_seed 0"
kept = [name for name in cases if name not in (*from_the_state, from_the_batch)]
as_seen = (
    all(again[name] > 0.1 for name in from_the_state)
    and again[from_the_batch] == 0 and beside[from_the_batch] > 0.1
    and all(max(again[name], beside[name]) < 1e-3 for name in kept)
)
sys.exit(not as_seen)
PY
"$place/env/bin/python" -W ignore "$place/again.py" 2> "$place/said" || { cat "$place/said"; exit 1; }
