"""ESD: Erased Stable Diffusion (Gandikota et al., ICCV 2023, arXiv 2303.07345).

The UNet is trained to predict for the concept what the frozen model predicts when it is guided away from it:

    y(x_t) = eps*(x_t, 0) - eta ( eps*(x_t, c) - eps*(x_t, 0) )
    min_theta  E ||eps_theta(x_t, c) - y(x_t)||^2

with x_t a partly denoised picture of the concept. The authors' code of 2025 also erases c from the pictures of another
prompt f, whose x_t these then are [code]:

    y(x_t) = eps*(x_t, f) - (eta + 1) ( eps*(x_t, c) - eps*(x_t, 0) ),  min_theta  E ||eps_theta(x_t, f) - y(x_t)||^2

which with f = c is the loss above.

Stable Diffusion XL has the same loss, with pooled text and sizes beside the embeddings; c, f and the empty prompt are
whatever the pipeline feeds for them [code, 2025: the prompt "" is encoded, not replaced by zeros]. So it is in every
family (ours), also where guidance leads away from something else: zeros (SDXL), " " (Qwen-Image), or no instructions
before the prompt (Sana, Lumina 2).

Transformers that learn a flow (SD 3, FLUX.1) predict a velocity. With x_s = (1 - s) x_0 + s e, s from 1 (noise e) to 0
(picture x_0), it is v = dx_s / ds = e - x_0. Given x_s, e = x_s + (1 - s) v: noise and velocity are affine in each
other, with the same slope and offset for every prompt. In y the weights of the predictions sum to 1 (1 + eta - eta),
and so do those of guidance (w and 1 - w). Both therefore commute with this change of variables: v put in the place of
eps gives the same target, and the losses differ by a factor alone,

    y_v = v*(x_s, 0) - eta ( v*(x_s, c) - v*(x_s, 0) ),  y = x_s + (1 - s) y_v,  ||eps - y||^2 = (1 - s)^2 ||v - y_v||^2

What differs is which s are seen. x_s is a point of the pipeline's own way, at a step drawn uniformly, so that the shift
of its sigmas (to the noisy side in SD 3, by the size of the picture in FLUX.1) is in the s that are trained on; no
weight is put on the loss (ours).

FLUX.1-dev reads its guidance as a number g and has no negative branch: its v_g(x, c) stands for v_1(x, 0) +
g ( v_1(x, c) - v_1(x, 0) ). x_s is drawn with g = `guidance`, and the predictions of the target, and the one that is
trained, are all made at this g, where pictures are drawn (ours). So far as the model does what it stands for, v_g(x, 0)
is v_1(x, 0), and y has eta g in the place of eta. The authors' script for FLUX.1, of which a copy was read, draws x_s
at 3.5 and predicts at g = 1.

Notation (code -> paper or code of the authors):

    eta         -> eta, negative guidance (negative_guidance - 1 in the code of 2025)
    anchor      -> f, erase_from in the code of 2025
    guidance    -> guidance while x_t is drawn (start_guidance in the code)
    parameters  -> train_method: "x" is ESD-x, "u" is ESD-u
    sampler     -> ddim_steps, steps of the sampler that draws x_t

`erasekit.states` draws x_t of Stable Diffusion 1 and 2; `erasekit.recorded` takes that of the others from the call of
their pipeline, with all else that the denoiser is given.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from erasekit.concepts import Concept, check_templates, fill
from erasekit.conditioning import predict
from erasekit.edits import Edit
from erasekit.layers import denoiser_parameters
from erasekit.models import DiffusionModel
from erasekit.recorded import Recorded
from erasekit.recorded import State as Recording
from erasekit.settings import EMOJI_TEMPLATES, asked, check, erase_prompts
from erasekit.states import Source, State, States, check_sources
from erasekit.tuning import check_changed, descend, difference, trainee


@dataclass(frozen=True)
class Config:
    """Settings of ESD; symbols in the module docstring.

    parameters: which of the denoiser's are trained: "x" (cross-attention), "u" (all but cross-attention, time embedding
    and output), "x-strict" (its keys and values), "self" (self-attention), "full". Where text and picture share their
    attention, as in SD 3 and FLUX.1: "x" (its linear layers), "x-strict" (those of keys and values), "full".
    iterations, lr, batch: of Adam. templates: prompts with one {} for the concept; each row of a batch draws one.
    states: where x_t comes from. "trained": anew at every update, by the model in training [code, 2023]; "frozen":
    anew, by the frozen model [code, 2025]; "cached": by the frozen model, each trajectory computed once and all its
    points used again (ours). noises: noise seeds for each prompt, all that "cached" keeps; None for a new one at every
    update. faithful: the noise level of the code of 2023, where x_t is two sampler steps cleaner than the time step
    that the UNet is told; of Stable Diffusion 1 and 2 alone. pixels: height and width of the pictures that x_t leads
    to, the model's own if None, which they always are of Stable Diffusion 1 and 2.
    """

    eta: float = 1.0
    guidance: float = 3.0
    parameters: str = "x"
    iterations: int = 1000
    lr: float = 1e-5
    batch: int = 1
    sampler: int = 50
    templates: tuple[str, ...] = ("{}",)
    states: Source = "trained"
    noises: int | None = None
    faithful: bool = False
    pixels: int | None = None

    def __post_init__(self):
        check(self, guidance=0, iterations=1, lr=0, batch=1, sampler=1)
        check(self, **{} if self.pixels is None else {"pixels": 1})
        check_sources(self)
        check_templates(self.templates)


PRESETS = {
    # ours, for the captions of the emoji world
    "emoji": Config(
        iterations=300, lr=1e-4, batch=8, sampler=25, templates=EMOJI_TEMPLATES, states="cached", noises=4
    ),
    # settings of the authors' first code, 2023
    "sd14-artist": Config(parameters="x"),
    "sd14-object": Config(parameters="u"),
    "sd14-nudity": Config(parameters="u"),
    # of the rewrite of 2025, whose target starts from the concept: its eta = 2 is eta = 1 here
    "sd14-2025": Config(parameters="x", lr=5e-5, iterations=200, states="frozen"),
    # of the script for SDXL of 2025; its negative_guidance = 1 is eta = 0 here
    "sdxl": Config(eta=0.0, guidance=2.0, parameters="x", lr=2e-4, iterations=200, states="frozen"),
    # of the script for FLUX.1-dev, read in a copy; for all transformers (ours)
    "flux": Config(eta=0.0, guidance=3.5, parameters="x", lr=1e-4, iterations=1400, sampler=28, pixels=512),
}


def fit(
    model: DiffusionModel,
    erase: str | Concept | Sequence[str | Concept],
    preserve: str | Concept | Sequence[str | Concept] = (),
    *,
    anchor: str | Concept | None = None,
    config: Config | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[dict], None] | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> Edit:
    """Erase concepts by training a copy of the denoiser; returns a weight_delta Edit and leaves the model alone.

    preserve: not used, ESD has no term for it; a warning says so. anchor: what the concept is erased from, "a painting"
    for a painter; the concept itself if None, whose own anchor is not used either. A blank one trains the empty prompt,
    which all guided pictures use, and never the concept's own. config: None takes the preset of the model ("emoji",
    "sd14-object", "sdxl", or "flux" for a transformer). generator: seed 0 if None. callback: step and loss at every
    update. folder: of the checkpoints, from which an interrupted call with the same arguments goes on. Raises
    ValueError for unknown concepts and nothing to erase, for a pipeline that cannot be trained so, and where training
    changed no weight; FloatingPointError for a loss that is not finite (the last good state stays).
    """
    config, erased, _, generator = asked(
        PRESETS, model, config, erase, preserve, anchor, generator, families=True
    )
    check_own(model, config)
    if preserve:
        warnings.warn("ESD has no term that preserves: `preserve` changes nothing", stacklevel=2)
    if anchor is None and any(one.anchor is not None for one in erased):
        warnings.warn(
            "ESD puts nothing in the place of a concept: its own anchor changes nothing; what it is erased from is "
            "`anchor` of `fit`",
            stacklevel=2,
        )
    prompts = about = erase_prompts(erased, config.templates)
    if anchor is not None:
        instead = anchor.name if isinstance(anchor, Concept) else anchor
        prompts = [fill(t, instead)[0] for one in erased for t in one.templates or config.templates]
    module = trainee(model.denoiser, denoiser_parameters(model.denoiser, config.parameters))
    seed = int(torch.randint(2**31, (), generator=generator))
    compared = _by_states if model.own_loop else _by_calls
    pair = compared(model, module, prompts, prompts if anchor is None else about, seed, config, folder)

    def loss(step: int, generator: torch.Generator) -> dict:
        prompt = torch.randint(len(prompts), (config.batch,), generator=generator)
        predicted, target = pair(prompt, generator)
        return {"loss": (predicted.float() - target.float()).square().mean()}

    descend(
        "esd", model, module, loss, config, prompts, generator, callback, folder, progress,
        also=[] if anchor is None else about,
    )  # fmt: skip
    concepts = {
        "erase": [one.name for one in erased], "anchor": [] if anchor is None else [instead], "preserve": [],
    }  # fmt: skip
    change = difference(module, model.denoiser, model.denoiser_part)
    check_changed(change, config)
    return Edit.from_weight_delta(change, model, method="esd", config=config, concepts=concepts)


# Prompts (n,) and a generator -> what the copy predicts for them at x_t, and the target there

Pair = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


def _by_states(
    model: DiffusionModel,
    unet: nn.Module,
    prompts: list,
    about: list,
    seed: int,
    config: Config,
    folder: Path,
) -> Pair:
    """For Stable Diffusion 1 and 2. about: for each prompt f that of c, the same list where f = c."""
    states = States(
        model, prompts, seed, config.guidance, config.sampler, config.states, config.noises, config.faithful,
        unet if config.states == "trained" else None, folder,
    )  # fmt: skip
    concept = model.conditioning(about)

    @torch.no_grad()
    def target(state: State, prompt: Tensor) -> Tensor:
        if about is prompts:
            return state.target(config.eta)
        with torch.autocast(model.device.type, enabled=False):
            said = predict(model.unet, state.sample, state.timestep, concept[prompt])
        return state.text - (config.eta + 1) * (said - state.uncond)

    def pair(prompt: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        state, prompt = states.at(states.pick(prompt, generator)), prompt.to(model.device)
        predicted = predict(unet, state.sample, state.timestep, states.text[prompt])
        return predicted, target(state, prompt)

    return pair


def _by_calls(
    model: DiffusionModel,
    module: nn.Module,
    prompts: list,
    about: list,
    seed: int,
    config: Config,
    folder: Path,
) -> Pair:
    """For every family that its pipeline draws, one x_t at a time; predictions are (n, numbers)."""
    points = Recorded(
        model, prompts, about, seed, config.guidance, config.sampler, config.states, config.noises, config.pixels,
        module if config.states == "trained" else None,
    )  # fmt: skip

    @torch.no_grad()
    def target(state: Recording, prompt: int) -> Tensor:
        with torch.autocast(model.device.type, enabled=False):
            of = lambda text: points.predict(model.denoiser, state, text).float()
            said, uncond = of(about[prompt]), of("")
            if about is prompts:
                return uncond - config.eta * (said - uncond)
            return of(prompts[prompt]) - (config.eta + 1) * (said - uncond)

    def pair(prompt: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        picks = points.pick(prompt, generator)
        states = [points.at(*pick) for pick in picks]
        predicted = [
            points.predict(module, state, prompts[one[0]]) for state, one in zip(states, picks, strict=True)
        ]
        wanted = [target(state, one[0]) for state, one in zip(states, picks, strict=True)]
        return torch.stack(predicted), torch.stack(wanted)

    return pair


def check_own(model: DiffusionModel, config: Config) -> None:
    """ValueError for settings that only the other kind of model knows."""
    if model.own_loop and config.pixels is not None:
        raise ValueError(
            "pixels is for SDXL and transformers: leave it out, x_t has the size of this model's own pictures"
        )
    if not model.own_loop and config.faithful:
        raise ValueError(
            "faithful=True is the lag of the code for Stable Diffusion 1: leave it out for other families"
        )
