"""MACE: mass concept erasure (Lu et al., CVPR 2024, arXiv 2403.06135).

Three stages. Closed-form refinement takes the concept's residue out of the words beside it: with e^f the embedding of a
token that stands in a prompt with the concept, and e^g that of the same token with the mapping concept in its place,

    min_W'  sum_i ||W' e_i^f - W e_i^g||^2 + lambda_1 sum_j ||W' e_j^p - W e_j^p||^2

Then a LoRA for each concept, on keys and values, turns the attention away that its own tokens S get inside its mask M,

    min  sum_{i in S} sum_l ||A_i^l * M||_F^2

at time steps drawn around those where it is decided which concept it will be (`focal`). Last the LoRAs are fused into
one weight, again in closed form:

    min_W*  sum_i sum_j ||W* e_j^{f,i} - (W' + dW_i) e_j^{f,i}||^2 + lambda_2 sum_j ||W* e_j^p - W e_j^p||^2

Notation (code -> paper): residue -> pairs (e^f, e^g); lambda_1, lambda_2 -> lambda_1, lambda_2; lam -> lamb, a ridge to
the weights before, of the code. Read from the authors' code at 057e7a6 (non-commercial licence; nothing was copied).
Differences: masks come from the model's own cross-attention, or from a segmentation model that the caller brings, and
are made smaller by area; a picture is trained with the prompt that drew it; the refinement counts erased rows by their
mean over all concepts, the fusion the sum of each concept's mean.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from PIL.Image import Image
from torch import Tensor, nn

from erasekit import closed_form, prompt_rows
from erasekit.closed_form import ContextMap
from erasekit.concepts import Concept, check_some_templates, eot_position, fill, slot_span, token_ids
from erasekit.conditioning import predict
from erasekit.edits import Edit
from erasekit.layers import attention_with_gradient, cross_attention_kv, grid_of, record_attention
from erasekit.models import DiffusionModel
from erasekit.retained import retained
from erasekit.sampling import ddim, denoise
from erasekit.settings import EMOJI_TEMPLATES, anchors, asked, check, warn_of_itself
from erasekit.text_entries import spaces
from erasekit.tuning import descend, discard, telling, trainee


@dataclass(frozen=True)
class Config:
    """Settings of MACE; symbols in the module docstring.

    anchor: the mapping concept. templates: prompts with one {} for both. lambda_1, lambda_2, lam: as above; the erased
    rows count by their mean. keep_templates: captions of what is preserved, taken in turn. rank, lr, iterations, batch:
    of each concept's LoRA (AdamW). pictures: the model's own, of each concept. mask: share of the highest attention
    from which a pixel belongs to the concept; 0 takes all pixels, as the authors do for styles and as is done for a
    concept with templates of its own. ends: the first end token and the padding behind it count as the concept's too
    [code]. squared: the paper's squared norm, a mean; False is the code's plain norm, a sum. focal: draw time steps by
    `focal`, else uniformly. sampler, guidance: how the pictures are drawn, guidance above 1. lora: leave out stages two
    and three if False.
    """

    anchor: str = " "
    templates: tuple[str, ...] = ("a photo of the {}", "a picture of the {}", "an image of the {}", "{}")
    lambda_1: float = 1e-4
    lambda_2: float = 1e-4
    lam: float = 1e-3
    keep_templates: tuple[str, ...] = ("a photo of {}",)
    lora: bool = True
    rank: int = 1
    lr: float = 1e-5
    iterations: int = 50
    batch: int = 1
    pictures: int = 8
    mask: float = 0.5
    ends: bool = True
    squared: bool = True
    focal: bool = True
    sampler: int = 30
    guidance: float = 7.5

    def __post_init__(self):
        least = {"rank": 1, "iterations": 1, "batch": 1, "pictures": 1, "sampler": 1}
        check(self, lambda_1=0, lambda_2=0, lam=0, lr=0, mask=0, guidance=0, **least)
        if self.guidance <= 1:
            raise ValueError(f"pictures are drawn with guidance above 1, got {self.guidance}")
        if self.mask >= 1:
            raise ValueError(f"mask is a share of the highest attention, below 1, got {self.mask}")
        check_some_templates(self.templates, self.keep_templates)


STYLES = ("a painting by {}", "a drawing in the style of {}", "a picture in the style of {}", "art by {}")

PRESETS = {
    # ours, for the captions of the emoji world
    "emoji": Config(
        templates=EMOJI_TEMPLATES, keep_templates=EMOJI_TEMPLATES, lambda_1=1e-3, lambda_2=1e-3, lr=1e-3,
        iterations=100, batch=8, sampler=25, guidance=3.0,
    ),
    # learning rates, steps and mapping concepts of the authors' configurations
    "sd14-object": Config(anchor="sky"),
    "sd14-celebrity": Config(anchor="a person", lr=1e-4),
    "sd14-artist": Config(anchor="art", lr=1e-4, mask=0.0, templates=STYLES),
    "sd14-nudity": Config(anchor="a person wearing clothes", iterations=120, focal=False),
}  # fmt: skip


# Stage 1: the words beside


def beside(tokenizer, prompt: str, other: str) -> tuple[list[int], list[int]]:
    """Positions of the tokens that two prompts share, paired: their common beginning and their common end, with the
    padding that follows. The phrase in which they differ is not among them.
    """
    a, b = (token_ids(tokenizer, [text])[0].tolist() for text in (prompt, other))
    ends = [int(eot_position(tokenizer, torch.tensor(one))) + 1 for one in (a, b)]
    a, b = a[: ends[0]], b[: ends[1]]
    shorter = min(ends)
    before = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    behind = next((i for i in range(shorter - before) if a[-1 - i] != b[-1 - i]), shorter - before)
    limit = tokenizer.model_max_length
    follows = behind + limit - max(ends)  # the padding, as far as both have it
    one, two = ([*range(before), *range(end - behind, end - behind + follows)] for end in ends)
    return one, two


def residue(model: DiffusionModel, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Rows e^f and e^g (n, d), float64, of prompts with the concept and with its mapping concept."""
    prompts = list(dict.fromkeys(prompt for pair in pairs for prompt in pair))
    table = dict(zip(prompts, model.encode(prompts).double(), strict=True))
    sources, targets = [], []
    for prompt, other in pairs:
        one, two = beside(model.tokenizer, prompt, other)
        sources.append(table[prompt][one])
        targets.append(table[other][two])
    return torch.cat(sources), torch.cat(targets)


def entry_rows(
    model: DiffusionModel, pairs: Sequence[tuple[str, str, str]], captions: Sequence[str], concepts: dict
) -> dict[int, closed_form.Rows]:
    """{space: rows} of the refinement in a model with other text entries than keys and values, from prompts with the
    concept, with its mapping concept and with neither. A pooled row is that of an end token, which stands beside.
    """
    prompt, found = prompt_rows.reader(model), {}
    kept = prompt_rows.preserved(model, prompt, captions)
    for space, entry in spaces(model).items():
        sources, targets = [], []
        for texts in pairs:
            old, new, blank = map(prompt, texts)
            for at in prompt_rows.places(entry, old, new, blank):
                sources.append(old.rows[space][at.beside[0]])
                targets.append(new.rows[space][at.beside[1]])
        found[space] = closed_form.Rows(torch.cat(sources), torch.cat(targets), kept[space], concepts)
    return found


def refine(sources: Tensor, targets: Tensor, preserved: Tensor | None, config: Config) -> ContextMap:
    """Closed-form refinement: the map T with W' = W T, float64."""
    return closed_form.solve(
        sources,
        targets,
        preserved,
        erase_scale=1 / len(sources),
        preserve_scale=config.lambda_1,
        lam=config.lam,
    )


# Stage 2: a LoRA for each concept


def focal(count: int = 1000, first: float = 200, last: float = 400, sharpness: float = 0.05) -> Tensor:
    """Probabilities (count,) of the time steps: sigma(gamma (t - t_1)) - sigma(gamma (t - t_2)), normalized (CFIS)."""
    t = torch.arange(count, dtype=torch.float64)
    weight = torch.sigmoid(sharpness * (t - first)) - torch.sigmoid(sharpness * (t - last))
    return weight / weight.sum()


@dataclass(frozen=True, eq=False)
class Shown:
    """The model's own pictures of one concept: clean latents (n, channels, height, width), masks (n, height, width) of
    zeros and ones, prompts, and the columns of attention that are the concept's, (n, length) bool.
    """

    latents: Tensor
    masks: Tensor
    prompts: list[str]
    columns: Tensor


def columns(tokenizer, template: str, phrase: str, ends: bool) -> Tensor:
    """Which positions (length,) of a prompt are the concept's: those of the phrase in the template's slot, and with
    `ends` the first end token and all padding behind it.
    """
    chosen = torch.zeros(tokenizer.model_max_length, dtype=torch.bool)
    chosen[slot_span(tokenizer, template, phrase)] = True
    if ends:
        ids = token_ids(tokenizer, [fill(template, phrase)[0]])
        chosen[int(eot_position(tokenizer, ids)[0]) :] = True
    return chosen


# pictures and the concept's name -> masks (n, height, width) in [0, 1]
Segment = Callable[[list[Image], str], Tensor]


@torch.no_grad()
def shown(
    model: DiffusionModel, concept: Concept, config: Config, seed: int, segment: Segment | None = None
) -> Shown:
    """Pictures of a concept by the model as it is, masked by its own attention to the phrase, or by `segment`, whose
    masks are resized to the latents; an empty one counts as all pixels.
    """
    given = concept.templates or config.templates
    templates = [given[i % len(given)] for i in range(config.pictures)]
    prompts = [fill(template, concept.name)[0] for template in templates]
    size = model.latent_size
    own = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    with record_attention(model.unet) as maps:
        latents = denoise(
            model.unet, ddim(model.scheduler), model.conditioning(prompts), model.unconditional().times(len(prompts)),
            own, steps=config.sampler, guidance=config.guidance, size=size,
        )  # fmt: skip
    phrase, marked = (
        torch.stack([columns(model.tokenizer, template, concept.name, ends) for template in templates])
        for ends in (False, config.ends)
    )
    if segment is None:
        heat = torch.stack(
            [
                sum(
                    maps.heatmap(token, size)[len(prompts) + i] for token in span.nonzero().flatten().tolist()
                )
                for i, span in enumerate(phrase)
            ]
        )
        high = heat.flatten(1).amax(1)[:, None, None]
        masks = (heat >= config.mask * high).float() if config.mask else torch.ones_like(heat)
    else:
        masks = segment(model.decode(latents), concept.name)
        if masks.ndim != 3 or len(masks) != len(prompts):
            raise ValueError(
                f"segment should give {len(prompts)} masks (n, height, width), got {tuple(masks.shape)}"
            )
        cover = F.interpolate(masks[:, None].float(), size, mode="area")[:, 0]
        # from half a pixel on; of what is smaller its fullest pixels; all where nothing was found, as in the code
        masks = (cover >= cover.flatten(1).amax(1).clamp(max=0.5)[:, None, None]).float()
    return Shown(latents, masks.to(model.device), prompts, marked.to(model.device))


def attention_loss(maps: Iterable[Tensor], masks: Tensor, marked: Tensor, squared: bool = True) -> Tensor:
    """The attention that marked columns get inside the masks, summed over the layers.

    maps: probabilities (n, heads, pixels, tokens) of each layer; masks (n, height, width); marked (n, tokens). squared:
    mean of the squares over heads, masked pixels and marked columns; else the code's norm over all of them. 0 where
    nothing is masked or marked.
    """
    total = masks.new_zeros(())
    for probabilities in maps:
        total = total + 0 * probabilities.float().sum()  # so that there is a gradient, if only of nothing
        grid = grid_of(probabilities.shape[2], masks.shape[-2:])
        inside = (F.interpolate(masks[:, None], grid, mode="area")[:, 0] >= 0.5).flatten(1)
        chosen = inside[:, None, :, None] & marked[:, None, None, :]
        picked = torch.where(chosen, probabilities.float(), 0.0)
        count = chosen.sum() * probabilities.shape[1]
        if count == 0:
            continue
        total = total + (picked.square().sum() / count if squared else picked.square().sum().sqrt())
    return total


def suppress(
    model: DiffusionModel,
    concept: Concept,
    pictures: Shown,
    config: Config,
    generator: torch.Generator,
    callback: Callable[[dict], None] | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> tuple[dict[str, Tensor], Path]:
    """Train one concept's LoRA on a model (with the refined weights): {key or value weight: B A}, float32, and the
    folder of its checkpoint, which is left for the caller to discard.
    """
    unet, text = adapter(model, config.rank, generator), model.conditioning(pictures.prompts)
    scheduler = ddim(model.scheduler)
    likely = focal(scheduler.config.num_train_timesteps)
    likely = likely if config.focal else torch.ones_like(likely)

    def loss(step: int, generator: torch.Generator) -> dict:
        picked = torch.randint(len(pictures.latents), (config.batch,), generator=generator)
        t = torch.multinomial(likely, config.batch, replacement=True, generator=generator).to(model.device)
        at = picked.to(model.device)
        clean = pictures.latents[at]
        noise = torch.randn(clean.shape, generator=generator).to(clean.device, clean.dtype)
        with attention_with_gradient(unet) as maps:
            noisy = scheduler.add_noise(clean, noise, t)
            predict(unet, noisy, t, text[at])
        return {
            "loss": attention_loss(maps.values(), pictures.masks[at], pictures.columns[at], config.squared)
        }

    place = descend(
        "mace", model, unet, loss, config, [concept.name, *pictures.prompts], generator, callback, folder, progress,
        weight_decay=0.01, clip=1.0, also=[pictures.latents, pictures.masks, pictures.columns], clean=False,
        again=False,
    )  # fmt: skip
    return products(unet), place


def adapter(model: DiffusionModel, rank: int, generator: torch.Generator) -> nn.Module:
    """A copy of the UNet with a fresh LoRA on keys and values of cross-attention: A ~ N(0, 1/r^2), B = 0, scale 1."""
    unet = trainee(model.unet, ())
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=r".*attn2\.to_[kv]"))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            # PEFT gives it the precision of the weight beside it
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if "lora_A" in name:
            value = torch.randn(parameter.shape, generator=generator) / rank
            parameter.data.copy_(value)
    return unet


def products(unet: nn.Module) -> dict[str, Tensor]:
    """{key or value weight: B A} of a UNet made by `adapter`."""
    found = {}
    for name, module in unet.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[f"{name}.weight"] = (b @ a).detach().cpu()
    return found


# Stage 3: one weight for all


def fuse(
    weights: Mapping[str, Tensor],
    first: ContextMap,
    changes: Sequence[Mapping[str, Tensor]],
    keys: Sequence[Tensor],
    preserved: Tensor | None,
    config: Config,
) -> dict[str, Tensor]:
    """W* - W, float64, of every key and value weight W.

    W* = W' + (sum_i dW_i C_i + lambda_2 (W - W') P) (sum_i C_i + lambda_2 P + lam I)^-1 with C_i the mean of e e^T over
    the keys (n_i, d) of concept i, and P the Gram matrix of the preserved rows: one factorization for all layers.
    """
    grams = [rows.double().T @ rows.double() / len(rows) for rows in keys]
    kept = (
        grams[0].new_zeros(grams[0].shape) if preserved is None else preserved.double().T @ preserved.double()
    )
    whole = sum(grams) + config.lambda_2 * kept + config.lam * torch.eye(len(kept)).to(kept)
    factor = closed_form.cholesky((whole + whole.T) / 2, "the fusion is singular: raise its ridge")
    found = {}
    for name, weight in weights.items():
        w = weight.detach().double()
        moved = first.apply_to_weight(w) - w
        pull = sum(change[name].double().to(w) @ gram for change, gram in zip(changes, grams, strict=True))
        pull = pull - config.lambda_2 * moved @ kept
        found[name] = moved + torch.cholesky_solve(pull.T, factor).T
    return found


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
    segment: Segment | None = None,
) -> Edit:
    """Erase concepts; returns a weight_delta of the keys and values, and of SDXL's pooled entry, which the refinement
    alone changes; or a context_map when config.lora is False: then also for transformers, as a text_maps Edit.

    anchor: the mapping concept, else the concept's own, else the config's. preserve: what captions are kept; when
    empty, all other concepts of the emoji world, or COCO's categories. segment: a segmentation model, given the
    pictures of a concept and its name, for masks instead of the attention's. callback: after stage 1 (step -1) rank,
    erase_residual and preserve_drift; in stage 2 step, loss and concept. generator, folder and errors as in `esd.fit`.
    """
    config, erased, preserved, generator = asked(
        PRESETS, model, config, erase, preserve, anchor, generator, trains=lambda config: config.lora
    )
    if config.lora:
        model.check_drawn()
    instead = anchors(erased, anchor, config.anchor)
    warn_of_itself(zip(erased, instead, strict=True))
    pairs = [
        (fill(template, concept.name)[0], fill(template, other)[0], fill(template, "")[0])
        for concept, other in zip(erased, instead, strict=True)
        for template in concept.templates or config.templates
    ]
    names, captions = retained(model, erased, preserved, config.keep_templates, null=True)
    concepts = {"erase": [one.name for one in erased], "anchor": instead, "preserve": names}
    named = dict(method="mace", config=config, concepts=concepts)
    if model.own_loop or config.lora:
        kept = closed_form.condensed(model.encode(captions).double().flatten(0, 1))
    if model.own_loop:
        sources, targets = residue(model, [pair[:2] for pair in pairs])
        first = refine(sources, targets, kept, config)
        if callback is not None:
            given = closed_form.Rows(sources, targets, kept, concepts)
            callback({"step": -1, "rank": first.compressed(1e-7).rank, **closed_form.residuals(first, given)})
        stage = Edit.from_context_map(first, model, **named)
    else:
        found = entry_rows(model, pairs, captions, concepts)
        solve = lambda rows: refine(rows.sources, rows.targets, rows.preserved, config)
        stage = prompt_rows.solved(model, found, solve, callback, -1, **named)
    if not config.lora:
        return stage

    refined, beside = stage.merged(model, shared=True), {}
    if not model.own_loop:
        first, beside = prompt_rows.keys_and_values(model, stage, refined)
    changes, keys, places = [], [], []
    for concept in erased:
        seed = int(torch.randint(2**31, (), generator=generator))
        # styles have templates of their own, and are everywhere
        pictures = shown(
            model, concept, replace(config, mask=0.0) if concept.templates else config, seed, segment
        )
        tell = telling(callback, concept=concept.name)
        change, place = suppress(refined, concept, pictures, config, generator, tell, folder, progress)
        changes.append(change)
        places.append(place)
        texts = [fill(t, concept.name)[0] for t in concept.templates or config.templates]
        keys.append(model.encode(texts).flatten(0, 1))
    weights = {name: layer.weight for name, layer in cross_attention_kv(model.unet).items()}
    fused = fuse(weights, first, changes, keys, kept, config)
    discard(places)  # not before: an interrupted call finds the concepts that were done
    whole = beside | {f"unet.{name}": change for name, change in fused.items()}
    return Edit.from_weight_delta({name: one.half() for name, one in whole.items()}, model, **named)
