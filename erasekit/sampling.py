"""One explicit denoising loop: classifier-free guidance, one generator per picture, a callback."""

import copy
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def denoise(
    unet,
    scheduler,
    text_embeddings: Tensor,
    uncond_embeddings: Tensor,
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    guidance: float,
    size: tuple[int, int],
    callback: Callable[[dict], None] | None = None,
) -> Tensor:
    """Latents (n, channels, *size) drawn from noise.

    text_embeddings, uncond_embeddings: (n, length, d), any device the UNet is on. generators: n CPU
    generators, from which picture i takes all its noise (drawn in float32, then rounded to the UNet's dtype,
    so that a picture starts from the same noise on every device). scheduler: any diffusers scheduler; a copy
    is used. guidance: w in e = e_uncond + w (e_text - e_uncond); at 1 or less the unconditional pass is left
    out, as in diffusers.

    callback gets one dict per step: step (from 0), timestep (int), latents after the step, and pred_x0, the
    current estimate of the clean latents, or None where the scheduler does not give one.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=unet.device)
    shape = (unet.config.in_channels, *size)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    latents = noise.to(unet.device, unet.dtype) * scheduler.init_noise_sigma
    guided = guidance > 1
    context = torch.cat([uncond_embeddings, text_embeddings]) if guided else text_embeddings
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if takes_generator else {}

    for step, t in enumerate(scheduler.timesteps):
        doubled = torch.cat([latents, latents]) if guided else latents
        doubled = scheduler.scale_model_input(doubled, t)
        prediction = unet(doubled, t, encoder_hidden_states=context, return_dict=False)[0]
        if guided:
            uncond, text = prediction.chunk(2)
            prediction = uncond + guidance * (text - uncond)
        result = scheduler.step(prediction, t, latents, **extra)
        latents = result.prev_sample
        if callback is not None:
            pred_x0 = getattr(result, "pred_original_sample", None)
            callback({"step": step, "timestep": int(t), "latents": latents, "pred_x0": pred_x0})
    return latents
