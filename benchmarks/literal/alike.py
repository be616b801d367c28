"""The published loops with the settings of a method's Config and the random numbers that the method draws from a seed.

Each yields the loss of every update, as the method's callback gives it. One prompt, and a batch of one. What Config has
no switch for is an argument.
"""

from collections.abc import Iterator, Sequence

import torch
from literal import advunlearn as literal_advunlearn
from literal import esd as literal_esd
from literal import trce as literal_trce
from literal import unlearndiff as literal_unlearndiff
from torch import Tensor

from erasekit.attacks import unlearndiff
from erasekit.concepts import content_ids
from erasekit.layers import text_parameters, token_table, unet_parameters
from erasekit.methods import advunlearn, esd, trce
from erasekit.models import DiffusionModel
from erasekit.retained import retained
from erasekit.sampling import ddim
from erasekit.settings import asked, erase_prompts
from erasekit.tokens import layout, vocabulary


def number(generator: torch.Generator, high: int, count: int = 1) -> list[int]:
    """Whole numbers from 0 to high - 1."""
    return torch.randint(high, (count,), generator=generator).tolist()


def noise(model: DiffusionModel, seed: int) -> Tensor:
    """(1, channels, height, width)"""
    shape = (1, model.unet.config.in_channels, *model.latent_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn(generator: torch.Generator, model: DiffusionModel, config, count: int = 1) -> list[list[int]]:
    """Of `count` states the seeds of their noise (beyond the first one), nodes, and places in the nodes' stretches."""
    stretch = model.scheduler.config.num_train_timesteps // config.sampler
    noises = getattr(config, "noises", None) or 2**31
    return [number(generator, high, count) for high in (noises, config.sampler, stretch)]


def esd_losses(
    model: DiffusionModel, config: esd.Config, erase: str, seed: int, anchor: str | None = None
) -> Iterator[float]:
    """ESD; the code of 2023 with states="trained", faithful=True."""
    generator, unet = torch.Generator().manual_seed(seed), model.copy().unet
    config, erased, _, generator = asked(esd.PRESETS, model, config, erase, (), anchor, generator)
    (concept,) = erase_prompts(erased, config.templates)
    prompt = concept if anchor is None else config.templates[0].format(anchor)
    (base,) = number(generator, 2**31)

    def draws() -> Iterator[literal_esd.Draw]:
        for _ in range(config.iterations):
            number(generator, 1)  # the prompt
            (start,), (e,), (offset,) = drawn(generator, model, config)
            yield noise(model, base + start), e, offset

    return literal_esd.train(
        unet, model.unet, ddim(model.scheduler), model.encode(prompt), model.encode(""), draws(),
        [unet.get_parameter(name) for name in unet_parameters(unet, config.parameters)],
        lr=config.lr, eta=config.eta, guidance=config.guidance, steps=config.sampler, lag=config.faithful,
        walker=None if config.states == "trained" else model.unet,
        concept=None if anchor is None else model.encode(concept),
    )  # fmt: skip


def advunlearn_losses(
    model: DiffusionModel, config: advunlearn.Config, erase: str, preserve: Sequence[str], seed: int
) -> Iterator[float]:
    """AdvUnlearn with a prefix of one random token; the code with faithful=True."""
    generator, own = torch.Generator().manual_seed(seed), model.copy()
    config, erased, preserved, generator = asked(
        advunlearn.PRESETS, model, config, erase, preserve, None, generator
    )
    (prompt,) = erase_prompts(erased, config.templates)
    _, kept = retained(
        model, erased, preserved, config.retain_templates,
        similarity=config.retain_similarity, null=config.retain_null,
    )  # fmt: skip
    base, order = number(generator, 2**31) + number(generator, 2**31)
    table, special = token_table(model.text_encoder), model.tokenizer.all_special_ids
    allowed = [i for i in range(len(table)) if config.faithful or i not in special]
    content = content_ids(model.tokenizer, prompt)
    content = content[: len(prompt.split())] if config.faithful else content  # the code counts words
    ids = model.tokenized([prompt])[0], layout(model.tokenizer, [[None, *content]])[0].to(model.device)

    def erasing() -> Iterator[literal_esd.Draw]:
        while True:
            (start,), (e,), (offset,) = drawn(generator, model, config)
            yield noise(model, base + start), e, offset

    def retaining(due: list[int]) -> Iterator[literal_esd.Draw]:
        for p, start, e, offset in zip(due, *drawn(generator, model, config, len(due)), strict=True):
            yield noise(model, base + 1 + 7919 * p + start), e, offset

    def random():
        for step in range(config.iterations):
            number(generator, 1)  # the prompt
            start = None
            if step >= config.warmup:
                start = table[allowed[number(generator, len(allowed))[0]]][None, None].float()
            due = advunlearn.turn(step, len(kept), config.retain_batch, order).tolist()
            yield start, due, erasing(), retaining(due)

    if config.part == "text":
        parameters = [own.text_encoder.get_parameter(name) for name in text_parameters(own.text_encoder)]
    else:
        parameters = [own.unet.get_parameter(name) for name in unet_parameters(own.unet, config.part)]
    return literal_advunlearn.train(
        own.text_encoder, own.unet, model.unet, ddim(model.scheduler), ids, model.tokenized(kept)[0],
        (model.encode(prompt), model.encode("")), model.encode(kept), random(), parameters, warmup=config.warmup,
        attack_steps=config.attack_steps, alpha=config.alpha, sign=config.rule == "sign", gamma=config.gamma,
        lr=config.lr, eta=config.eta, guidance=config.guidance, steps=config.sampler, slips=config.faithful,
    )  # fmt: skip


def trce_losses(
    model: DiffusionModel,
    start: DiffusionModel,
    pairs: Sequence[tuple[str, str, str, str]],
    config: trce.Config,
    seed: int,
    calm_slips: bool = False,
) -> Iterator[float]:
    """Stage 2 of TRCE, whole ways first; the code with faithful=True, early=26. start: the model after stage 1. pairs:
    of prompts, as `trce.steer` is given them. calm_slips: the lag of the preserved latents, which only the code has.
    """
    unet, scheduler = start.copy().unet, ddim(model.scheduler)
    generator, empty = torch.Generator().manual_seed(seed), model.encode("")
    (base,) = number(generator, 2**31)
    texts = [(model.encode(malicious), model.encode(safe)) for malicious, _, safe, _ in pairs]
    each = [(p, n) for n in range(config.noises) for p in range(len(pairs))]
    way = lambda text, own: literal_trce.way(
        model.unet, scheduler, text, empty, noise(model, own), config.sampler, config.guidance
    )
    ways = [way(texts[p][0], base + 7919 * p + n) for p, n in each]
    calm = [way(empty, base + 1 + n) for n in range(config.calm)]
    stretch = scheduler.config.num_train_timesteps // config.sampler

    def picks() -> Iterator[literal_trce.Pick]:
        for _ in range(config.iterations):
            (point,) = number(generator, len(ways) * config.early)
            rows, nodes, offsets = (
                number(generator, high, config.keep_batch) for high in (config.calm, config.sampler, stretch)
            )
            steps = [config.sampler - 1 - node for node in nodes]
            yield *divmod(point, config.early), list(zip(rows, steps, offsets, strict=True))

    first = config.reference == "stage1" and config.stages == "both"
    constant = config.weight * 0.01 / config.keep_batch  # of the code, and of no consequence
    found = literal_trce.train(
        unet, model.unet, start.unet if first else model.unet, [texts[p] for p, _ in each], empty, ways, calm, picks(),
        [unet.get_parameter(name) for name in unet_parameters(unet, "visual")], g=config.beta - 1,
        margin=config.margin, weight=config.weight, lr=config.lr, slips=config.faithful, calm_slips=calm_slips,
        branches=config.branches,
    )  # fmt: skip
    return (loss - constant for loss in found)


def unlearndiff_blocks(
    model: DiffusionModel,
    config: unlearndiff.Config,
    prompt: str,
    clean: Tensor,
    reached,
    seed: int,
    **settings,
) -> Iterator[dict]:
    """UnlearnDiffAtk on one prompt, whose generator in the product has this seed. clean: the target's latent, (1, ...).
    settings: reset=True, allowed=None and tolerance=1e-5 are the code's; the product has noise of its own for every
    block, searches no special tokens, and projects exactly.
    """
    (own,) = torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(seed)).tolist()
    settings = {"reset": False, "allowed": vocabulary(model.tokenizers, config.stable)} | settings
    return literal_unlearndiff.attack(
        model.pipeline, ddim(model.scheduler).add_noise, prompt, clean, reached, torch.Generator().manual_seed(own),
        k=config.k, timesteps=config.timesteps, updates=config.updates, alpha=config.alpha,
        weight_decay=config.weight_decay, **settings,
    )  # fmt: skip
