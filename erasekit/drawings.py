"""One picture and the way to it: what every denoising step estimates, where attention goes, what a judge sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from erasekit.attacks.ring_a_bell import concept_vector
from erasekit.concepts import token_ids
from erasekit.edits import Edit, applied
from erasekit.evaluate.judges import JUDGES, SURE, checked
from erasekit.layers import first_attention, grid_of
from erasekit.models import DiffusionModel


@dataclass(frozen=True, eq=False)
class Drawing:
    """A picture with its steps. estimates: of every step the clean picture that its prediction stands for. tokens: of
    the prompt, start and end among them. maps: cross-attention of every step, (steps, tokens, height, width), mean over
    layers and heads, in the size of the latents; None where the UNet's attention could not be recorded.
    """

    picture: Image.Image
    estimates: tuple[Image.Image, ...]
    tokens: tuple[str, ...]
    maps: Tensor | None


def estimated(model: DiffusionModel, state: dict, guidance: float) -> Tensor:
    """x_0 as the prediction of a step of `sampling.walk` has it, latents (n, channels, height, width): the scheduler's
    own, or where it gives none that of the guided prediction, with abar = `alphas_cumprod` of the time step,

        eps:  (x_t - sqrt(1 - abar) eps) / sqrt(abar)        v:  sqrt(abar) x_t - sqrt(1 - abar) v
    """
    if state["pred_x0"] is not None:
        return state["pred_x0"]
    text, uncond = state["text"], state["uncond"]
    said = text if uncond is None else uncond + guidance * (text - uncond)
    share = model.scheduler.alphas_cumprod[state["timestep"]].to(said)
    kind = model.scheduler.config.prediction_type
    if kind == "sample":
        return said
    if kind == "v_prediction":
        return share.sqrt() * state["sample"] - (1 - share).sqrt() * said
    return (state["sample"] - (1 - share).sqrt() * said) / share.sqrt()


def watch(
    model: DiffusionModel,
    edit: Edit | None,
    prompt: str,
    seed: int = 0,
    *,
    strength: float = 1.0,
    steps: int | None = None,
    guidance: float = 3.0,
    attack: tuple[str, float] | None = None,
) -> Drawing:
    """Draw one prompt under an edit (None: the model as it is) and keep every step. The picture is the one that
    `generate` gives.

    attack: a concept and eta. The prompt's embedding then has eta times the vector from "a thing" to "a CONCEPT" added,
    as the edited model encodes both: the attack of `attacks.concept_vector` with this one pair. ValueError for other
    models than Stable Diffusion 1 and 2, while an edit is in force, and as in `Edit.applied` and `generate`.
    """
    check_watched(model)
    model.check_unedited()
    latents, maps = [], []
    with applied(edit, model, strength), first_attention(model.unet) as seen:

        def note(state: dict) -> None:
            latents.append(estimated(model, state, guidance))
            if seen:
                maps.append(averaged(seen, latents[-1].shape[-2:]))
            seen.clear()

        how = {"steps": steps, "guidance": guidance, "batch_size": 1, "callback": note}
        if attack is None:
            (picture,) = model.generate([prompt], [seed], **how)
        else:
            prompts, seeds = model._pairs(prompt, seed)
            concept, eta = attack
            shift = concept_vector(model, [(f"a {concept}", "a thing")])
            moved = model.conditioning(prompts).each(lambda own, by: own + eta * by, shift)
            (picture,) = model.draw(moved, seeds, **how)
    ids = token_ids(model.tokenizer, [prompt])[0].tolist()
    count = ids.index(model.tokenizer.eos_token_id) + 1
    names = [model.tokenizer.decode([one]).strip() or "?" for one in ids[1 : count - 1]]
    pieces = torch.cat(latents).split(
        model.fixed_batch or 1
    )  # all at once would not fit where pictures are large
    return Drawing(
        picture,
        tuple(estimate for piece in pieces for estimate in model.decode(piece)),
        ("start", *names, "end"),
        torch.stack(maps)[:, :count] if maps else None,
    )


def check_watched(model: DiffusionModel) -> None:
    """ValueError for models whose steps are not seen."""
    if not model.own_loop:
        raise ValueError(
            f"the steps of a {type(model.pipeline).__name__} are taken by its own pipeline and not kept: look at its "
            "pictures with erasekit.widgets.explore"
        )


def averaged(seen: Mapping[str, Tensor], size: Sequence[int]) -> Tensor:
    """(tokens, height, width) of what `first_attention` saw of one picture, guided or not: the mean over heads and
    layers, all resized to one grid. Of every pixel the tokens' shares add up to 1.
    """
    found = []
    for probabilities in seen.values():
        one = probabilities[-1].detach().float().mean(0)  # (pixels, tokens); guidance puts the prompt last
        grid = one.T.unflatten(1, grid_of(len(one), tuple(size)))
        found.append(F.interpolate(grid[None], tuple(size), mode="bilinear", align_corners=False)[0])
    return torch.stack(found).mean(0).cpu()


def heat(attention: Tensor, top: float) -> Image.Image:
    """Attention (height, width) as colors, from black at 0 to light yellow at `top`."""
    return Image.fromarray(colormaps["magma"](attention.numpy() / max(top, 1e-12), bytes=True)[..., :3])


def token_of(tokens: Sequence[str], concept: str) -> int:
    """The last token that is part of the concept's name, else the prompt's last one."""
    words = concept.lower().split()
    inside = [i for i, one in enumerate(tokens[1:-1], 1) if any(one in word for word in words)]
    whole = [i for i in inside if tokens[i] in words]
    return (whole or inside or [max(1, len(tokens) - 2)])[-1]


def verdicts(model: DiffusionModel, pictures: Sequence[Image.Image]) -> list[str]:
    """What the world's judge sees on each picture: a name with its probability, or "none" where no name has half of
    it, with the likeliest in brackets. Empty texts for a model without a world of its own.
    """
    if not model.everything:
        return [""] * len(pictures)
    said = []
    for record in checked(JUDGES["emoji-object"](), pictures, [""] * len(pictures)):
        name = max(record, key=record.get)
        seen = f"{name} {record[name]:.2f}"
        said.append(seen if record[name] >= SURE else f"none ({seen})")
    return said
