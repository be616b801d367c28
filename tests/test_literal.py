"""The published training loops, written out in benchmarks/literal/, and what the product does: the same x_t, prompts and
weights give the same losses and gradients, at the settings that each test names.
"""

from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import pytest
import torch
from conftest import literal_loop, tiny_pipeline
from torch.optim.optimizer import register_optimizer_step_pre_hook

from erasekit import models
from erasekit.attacks import common, unlearndiff
from erasekit.concepts import Concept, content_ids
from erasekit.layers import text_parameters, token_table, unet_parameters
from erasekit.methods import advunlearn, esd, trce
from erasekit.sampling import ddim
from erasekit.tokens import layout, vocabulary

NEAR = 1e-5  # relative, in float64
ESD, ADVUNLEARN, TRCE, UNLEARNDIFF = map(literal_loop, ("esd", "advunlearn", "trce", "unlearndiff"))
STEPS, STRETCH = 5, 200


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.states.FOLDER", tmp_path)
    return tmp_path


@contextmanager
def gradients():
    """What every optimizer is given inside the block, step by step, as one vector each."""
    seen = []

    def look(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in parameters]
        seen.append(torch.cat([part.flatten() for part in parts]).double().cpu())

    hook = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def apart(ours, theirs) -> float:
    """The largest relative difference of losses and of gradients; both are (losses, gradients)."""
    (losses, steps), (wanted, others) = ours, theirs
    assert len(losses) == len(wanted) and len(steps) == len(others) and len(losses) > 1
    far = [abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)]
    far += [float((a - b).norm() / b.norm()) for a, b in zip(steps, others, strict=True)]
    return max(far)


def exact(device="cpu", dtype=torch.float64) -> models.DiffusionModel:
    return models.load(tiny_pipeline().to(dtype), device=device)


def noise(model, seed: int) -> torch.Tensor:
    shape = (1, model.unet.config.in_channels, *model.latent_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def number(generator, high: int, count: int = 1) -> list[int]:
    return torch.randint(high, (count,), generator=generator).tolist()


# ESD

SHORT_ESD = esd.Config(iterations=3, lr=1e-3, sampler=STEPS, templates=("a {}",))
# Settings of the product, and of the loop. Its own is that of the code of 2023.
ESD_SWITCHES = {
    'states="trained", faithful=True': (dict(faithful=True), dict(lag=True)),
    'states="trained"': (dict(), dict(lag=False)),
    'states="frozen"': (dict(states="frozen"), dict(lag=False, walker="frozen")),
    'states="cached", noises=2': (dict(states="cached", noises=2), dict(lag=False, walker="frozen")),
    'states="frozen", anchor="house"': (
        dict(states="frozen"), dict(lag=False, walker="frozen", concept="a church"),
    ),
}  # fmt: skip


def esd_product(model, changes, anchor=None):
    seen = []
    with gradients() as steps:
        esd.fit(
            model, "church", config=replace(SHORT_ESD, **changes), generator=torch.Generator().manual_seed(3),
            anchor=anchor, callback=lambda state: seen.append(state["loss"]),
        )  # fmt: skip
    return seen, steps


def esd_literal(model, settings, noises=None, prompt="a church"):
    unet = model.copy().unet
    generator = torch.Generator().manual_seed(3)
    (base,) = number(generator, 2**31)

    def draws():
        for _ in range(SHORT_ESD.iterations):
            number(generator, 1)  # the prompt
            (start,), (e,), (offset,) = (number(generator, high) for high in (noises or 2**31, STEPS, STRETCH))
            yield noise(model, base + start), e, offset

    settings = dict(settings)
    walker = model.unet if settings.pop("walker", None) else None
    concept = settings.pop("concept", None)
    parameters = [unet.get_parameter(name) for name in unet_parameters(unet, "x")]
    with gradients() as steps:
        losses = list(ESD.train(
            unet, model.unet, ddim(model.scheduler), model.encode(prompt), model.encode(""), draws(), parameters,
            lr=SHORT_ESD.lr, steps=STEPS, walker=walker, concept=concept and model.encode(concept), **settings,
        ))  # fmt: skip
    return losses, steps


def esd_both(switches, device="cpu", dtype=torch.float64):
    changes, settings = ESD_SWITCHES[switches]
    anchor = "house" if "anchor" in switches else None
    ours = esd_product(exact(device, dtype), changes, anchor)
    prompt = "a house" if anchor else "a church"
    return ours, esd_literal(exact(device, dtype), settings, changes.get("noises"), prompt)


@pytest.mark.parametrize("switches", ESD_SWITCHES)
def test_esd(switches):
    ours, theirs = esd_both(switches)
    print(apart(ours, theirs))
    assert apart(ours, theirs) < NEAR


def test_esd_without_its_switch_is_another(folder):
    """faithful, where x_t comes from, and eta."""
    model = exact()
    theirs = esd_literal(model, dict(lag=True))
    for changes in (dict(), dict(faithful=True, states="frozen"), dict(faithful=True, eta=1.01)):
        assert apart(esd_product(model, changes), theirs) > 100 * NEAR


# AdvUnlearn

SHORT_ADVUNLEARN = advunlearn.Config(
    iterations=3, lr=1e-3, warmup=1, attack_steps=3, alpha=1e-2, retain_batch=3, sampler=STEPS, templates=("a {}",),
    retain_templates=("a {}",),
)  # fmt: skip
KEEP = ["dog", "house", "castle", "art"]
ADVUNLEARN_SWITCHES = {
    "faithful=True": (dict(faithful=True), dict(slips=True)),
    'faithful=True, rule="sign"': (dict(faithful=True, rule="sign"), dict(slips=True, sign=True)),
    'faithful=True, part="x"': (dict(faithful=True, part="x"), dict(slips=True)),
    'states="frozen"': (dict(), dict(slips=False)),
    'part="x", states="frozen"': (dict(part="x"), dict(slips=False)),
    'states="cached", noises=2': (dict(states="cached", noises=2), dict(slips=False)),
}


def advunlearn_product(model, changes, erase="church"):
    seen = []
    with gradients() as steps:
        advunlearn.fit(
            model, erase, KEEP, config=replace(SHORT_ADVUNLEARN, **changes),
            generator=torch.Generator().manual_seed(4), callback=lambda state: seen.append(state["loss"]),
        )  # fmt: skip
    return seen, steps


def advunlearn_literal(model, settings, part="text", noises=None, erase="church"):
    config, own = SHORT_ADVUNLEARN, model.copy()
    tokenizer, generator = model.tokenizer, torch.Generator().manual_seed(4)
    base, order = number(generator, 2**31) + number(generator, 2**31)
    table, slips = token_table(model.text_encoder), settings["slips"]
    allowed = [i for i in range(len(table)) if slips or i not in tokenizer.all_special_ids]
    prompt, kept = f"a {erase}", [f"a {name}" for name in KEEP]
    content = content_ids(tokenizer, prompt)
    content = content[: len(prompt.split())] if slips else content  # the code counts words
    ids = [model.tokenized([prompt])[0], layout(tokenizer, [[None, *content]])[0].to(model.device)]
    of = lambda seed: noise(model, seed)

    def random():
        draw = lambda count=1: [number(generator, high, count) for high in (noises or 2**31, STEPS, STRETCH)]

        def erased():
            while True:
                (start,), (e,), (offset,) = draw()
                yield of(base + start), e, offset

        def others(due):
            for p, start, e, offset in zip(due, *draw(len(due)), strict=True):
                yield of(base + 1 + 7919 * p + start), e, offset

        for step in range(config.iterations):
            number(generator, 1)  # the prompt
            start = None
            if step >= config.warmup:
                start = table[allowed[number(generator, len(allowed))[0]]][None, None].float()
            due = advunlearn.turn(step, len(kept), config.retain_batch, order).tolist()
            yield start, due, erased(), others(due)

    names = text_parameters(own.text_encoder) if part == "text" else unet_parameters(own.unet, part)
    module = own.text_encoder if part == "text" else own.unet
    with gradients() as steps:
        losses = list(ADVUNLEARN.train(
            own.text_encoder, own.unet, model.unet, ddim(model.scheduler), ids, model.tokenized(kept)[0],
            (model.encode(prompt), model.encode("")), model.encode(kept), random(),
            [module.get_parameter(name) for name in names], warmup=config.warmup, attack_steps=config.attack_steps,
            alpha=config.alpha, lr=config.lr, steps=STEPS, **settings,
        ))  # fmt: skip
    return losses, steps


def advunlearn_both(switches, device="cpu", dtype=torch.float64):
    changes, settings = ADVUNLEARN_SWITCHES[switches]
    changes = dict(states="frozen") | changes
    ours = advunlearn_product(exact(device, dtype), changes)
    part = changes.get("part", "text")
    return ours, advunlearn_literal(exact(device, dtype), settings, part, changes.get("noises"))


@pytest.mark.parametrize("switches", ADVUNLEARN_SWITCHES)
def test_advunlearn(switches):
    ours, theirs = advunlearn_both(switches)
    print(apart(ours, theirs))
    assert apart(ours, theirs) < NEAR


# TRCE, stage 2

# UnlearnDiffAtk
