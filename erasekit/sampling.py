"""One explicit denoising loop: classifier-free guidance, one generator per picture, a callback."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from erasekit.conditioning import Conditioning, joined, predict


def config_of(scheduler) -> dict:
    """What a scheduler was made with, for keys of what is kept on disk. Without the names of the defaults that
    `from_config` filled in: diffusers lists them in the order of a set, another one in every process.
    """
    return {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}


def switched(scheduler, cls: type):
    """A scheduler of another diffusers class with the same noise schedule. Where the old config does not say, latents
    are not clipped: diffusers' own default is to clip them to [-1, 1], as pixels.
    """
    known = inspect.signature(cls).parameters
    kept = {name: scheduler.config.get(name, False) for name in ("clip_sample", "set_alpha_to_one")}
    return cls.from_config(scheduler.config, **{name: kept[name] for name in kept if name in known})


def ddim(scheduler) -> DDIMScheduler:
    """A DDIM scheduler with the noise schedule of any diffusers scheduler: as many time steps as steps, and UNet inputs
    that are not rescaled. Training looks at x_t through it, whatever the model draws with.
    """
    return switched(scheduler, DDIMScheduler)


@contextmanager
def own_noise(scheduler, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Inside, `scheduler.step` takes the noise that a sampler adds on the way from the generators, of picture i from
    the i-th, also where a pipeline does not hand them on (Stable Diffusion 3, FLUX and most with a transformer).

    diffusers' DPM-Solver++ SDE knows no generator, only seeds for torchsde, one for each picture: they are drawn, and
    the generators are left as they were.
    """
    step, changed = scheduler.step, {}
    if "generator" in inspect.signature(step).parameters:
        changed["step"] = partial(step, generator=list(generators))
    if "noise_sampler_seed" in vars(scheduler):
        changed["noise_sampler_seed"] = [
            int(torch.randint(2**62, (), generator=one.clone_state())) for one in generators
        ]
    before = {name: vars(scheduler)[name] for name in changed if name in vars(scheduler)}
    vars(scheduler).update(changed)
    try:
        yield
    finally:
        for name in changed:
            del vars(scheduler)[name]
        vars(scheduler).update(before)


@torch.no_grad()
def walk(
    unet,
    scheduler,
    told: Conditioning,
    uncond: Conditioning,
    generators: Sequence[torch.Generator],
    *,
    steps: int,
    guidance: float,
    size: tuple[int, int],
    skip: int = 0,
    stop: int | None = None,
    start: Tensor | None = None,
) -> Iterator[dict]:
    """The way from noise to n pictures, one dict per step, computed as it is asked for.

    told, uncond: of n prompts, on the UNet's device. generators: n CPU
    generators, from which picture i takes all its noise (drawn in float32, then rounded to the UNet's dtype,
    so that a picture starts from the same noise on every device). scheduler: any diffusers scheduler; a copy
    is used. guidance: w in e = e_uncond + w (e_text - e_uncond); at 1 or less the unconditional pass is left
    out, as in diffusers. skip: steps left out at the noisy end; stop: the step, counted with those, before which the
    way ends. start: latents (n, channels, *size) to go on from, as a walk that stopped there left them, in place of
    the noise; a sampler that looks back at earlier steps begins anew, as a refiner's does.

    A dict has step (from 0), timestep (int), sample (n, channels, *size) before the step, latents after it, pred_x0,
    the current estimate of the clean latents, or None where the scheduler does not give one, and what the UNet
    predicts for `sample`: text, and uncond (None where guidance leaves it out).
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=unet.device)
    shape = (unet.config.in_channels, *size)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    latents = noise.to(unet.device, unet.dtype) * scheduler.init_noise_sigma
    if start is not None:
        latents = start.to(unet.device, unet.dtype)
    guided = guidance > 1
    context = joined([uncond, told]) if guided else told

    with own_noise(scheduler, generators):
        for step, t in enumerate(scheduler.timesteps[skip:stop]):
            sample, away = latents, None
            doubled = torch.cat([sample, sample]) if guided else sample
            doubled = scheduler.scale_model_input(doubled, t)
            prediction = text = predict(unet, doubled, t, context)
            if guided:
                away, text = prediction.chunk(2)
                prediction = away + guidance * (text - away)
            result = scheduler.step(prediction, t, sample)
            latents = result.prev_sample
            yield {
                "step": step,
                "timestep": int(t),
                "sample": sample,
                "latents": latents,
                "pred_x0": getattr(result, "pred_original_sample", None),
                "text": text,
                "uncond": away,
            }


def denoise(*args, callback: Callable[[dict], None] | None = None, **settings) -> Tensor:
    """Latents (n, channels, *size) drawn from noise: the end of a `walk` with the same arguments.

    callback gets the dict of each step.
    """
    for state in walk(*args, **settings):
        if callback is not None:
            callback(state)
    return state["latents"]
