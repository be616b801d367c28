"""ESD: Erased Stable Diffusion (Gandikota et al., ICCV 2023, arXiv 2303.07345).

The UNet is trained to predict for the concept what the frozen model predicts when it is guided away from it:

    y(x_t) = eps*(x_t, 0) - eta ( eps*(x_t, c) - eps*(x_t, 0) )
    min_theta  E ||eps_theta(x_t, c) - y(x_t)||^2

with x_t a partly denoised picture of the concept. The authors' code of 2025 also erases c from the pictures of another
prompt f, whose x_t these then are [code]:

    y(x_t) = eps*(x_t, f) - (eta + 1) ( eps*(x_t, c) - eps*(x_t, 0) ),  min_theta  E ||eps_theta(x_t, f) - y(x_t)||^2

which with f = c is the loss above.

Notation (code -> paper or code of the authors):

    eta         -> eta, negative guidance (negative_guidance - 1 in the code of 2025)
    anchor      -> f, erase_from in the code of 2025
    guidance    -> guidance while x_t is drawn (start_guidance in the code)
    parameters  -> train_method: "x" is ESD-x, "u" is ESD-u
    sampler     -> ddim_steps, steps of the sampler that draws x_t

`erasekit.states` draws x_t.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from erasekit.concepts import Concept, check_templates, fill
from erasekit.edits import Edit
from erasekit.layers import unet_parameters
from erasekit.models import DiffusionModel
from erasekit.settings import EMOJI_TEMPLATES, asked, check, erase_prompts
from erasekit.states import Source, State, States, check_sources
from erasekit.tuning import descend, difference, trainee


@dataclass(frozen=True)
class Config:
    """Settings of ESD; symbols in the module docstring.

    parameters: which of the UNet's are trained: "x" (cross-attention), "u" (all but cross-attention, time embedding and
    output), "x-strict" (its keys and values), "self" (self-attention), "full". iterations, lr, batch: of Adam.
    templates: prompts with one {} for the concept; each row of a batch draws one. states: where x_t comes from.
    "trained": anew at every update, by the model in training [code, 2023]; "frozen": anew, by the frozen model [code,
    2025]; "cached": by the frozen model, each trajectory computed once and all its points used again (ours). noises:
    noise seeds for each prompt, all that "cached" keeps; None for a new one at every update. faithful: the noise level
    of the code of 2023, where x_t is two sampler steps cleaner than the time step that the UNet is told.
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

    def __post_init__(self):
        check(self, guidance=0, iterations=1, lr=0, batch=1, sampler=1)
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
}


# x_t


# Training a copy of one part


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
    """Erase concepts by training a copy of the UNet; returns a weight_delta Edit and leaves the model alone.

    preserve: not used, ESD has no term for it; a warning says so. anchor: what the concept is erased from, "a painting"
    for a painter; the concept itself if None. config: None takes the preset of the model ("emoji" or "sd14-object").
    generator: seed 0 if None. callback: step and loss at every update. folder: of the checkpoints, from which an
    interrupted call with the same arguments goes on. Raises ValueError for unknown concepts and nothing to erase,
    FloatingPointError for a loss that is not finite (the last good state stays).
    """
    config, erased, _, generator = asked(PRESETS, model, config, erase, preserve, anchor, generator)
    if preserve:
        warnings.warn("ESD has no term that preserves: `preserve` changes nothing", stacklevel=2)
    prompts = about = erase_prompts(erased, config.templates)
    if anchor is not None:
        instead = anchor.name if isinstance(anchor, Concept) else anchor
        prompts = [fill(t, instead)[0] for one in erased for t in one.templates or config.templates]
    unet = trainee(model.unet, unet_parameters(model.unet, config.parameters))
    states = States(
        model, prompts, int(torch.randint(2**31, (), generator=generator)), config.guidance, config.sampler,
        config.states, config.noises, config.faithful, unet if config.states == "trained" else None, folder,
    )  # fmt: skip

    concept = model.encode(about)

    @torch.no_grad()
    def target(state: State, prompt: Tensor) -> Tensor:
        if anchor is None:
            return state.target(config.eta)
        with torch.autocast(model.device.type, enabled=False):
            said = model.unet(
                state.sample, state.timestep, encoder_hidden_states=concept[prompt], return_dict=False
            )[0]
        return state.text - (config.eta + 1) * (said - state.uncond)

    def loss(step: int, generator: torch.Generator) -> dict:
        prompt = torch.randint(len(prompts), (config.batch,), generator=generator)
        state, prompt = states.at(states.pick(prompt, generator)), prompt.to(model.device)
        text = states.text[prompt]
        predicted = unet(state.sample, state.timestep, encoder_hidden_states=text, return_dict=False)[0]
        return {"loss": (predicted.float() - target(state, prompt).float()).square().mean()}

    descend(
        "esd", model, unet, loss, config, prompts, generator, callback, folder, progress,
        also=[] if anchor is None else about,
    )  # fmt: skip
    concepts = {
        "erase": [one.name for one in erased], "anchor": [] if anchor is None else [instead], "preserve": [],
    }  # fmt: skip
    change = difference(unet, model.unet, "unet")
    return Edit.from_weight_delta(change, model, method="esd", config=config, concepts=concepts)
