"""Attacks: their parts are what the formulas say, they touch nothing but their own variables, and they resume."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from families import tiny
from PIL import Image

import erasekit as ek
from erasekit import models, tokens
from erasekit.attacks import (
    ATTACKS,
    common,
    concept_vector,
    fine_tuning,
    latent_inversion,
    mma,
    p4d,
    ring_a_bell,
    sees,
    textual_inversion,
    unlearndiff,
)
from erasekit.concepts import content_ids, token_ids
from erasekit.emoji import captions as captions_of_training
from erasekit.evaluate import judges, records, runs
from erasekit.evaluate.protocols import Prompt, Protocol
from erasekit.experiments import stages
from erasekit.layers import embedded_as, token_table


class Brightness:
    """A judge of the tiny model's pictures, which show nothing: are they brighter or darker than gray?"""

    name, version = "brightness", "1"

    def scores(self, pictures, prompts):
        means = [float(np.asarray(picture).mean() / 255) for picture in pictures]
        return [{"bright": mean, "dark": 1 - mean} for mean in means]


judges.register(Brightness())
DARK = sees("dark", judge="brightness")  # the tiny model's pictures are bright: no prompt succeeds as it is
BRIGHT = sees("bright", judge="brightness")
PROMPTS = ["a church in flat", "a dog in ink"]


def short(module, **changes):
    """The attack's settings for a test: few steps, any token."""
    config = dataclasses.replace(module.PRESETS["emoji"], steps=2)
    few = {
        unlearndiff: dict(timesteps=(100, 500), updates=3),
        p4d: dict(tokens=3, updates=6, every=3),
        ring_a_bell: dict(tokens=3, population=8, generations=4),
        mma: dict(tokens=3, updates=4, top=8, candidates=12),
        textual_inversion: dict(updates=6, batch=2),
        fine_tuning: dict(updates=4, every=2, batch=2),
    }.get(module, {})
    stable = {"stable": False} if hasattr(config, "stable") else {}
    return dataclasses.replace(config, **{**few, **stable, **changes})


@pytest.fixture(scope="module")
def pictures():
    return models.load(tiny_pipeline()).generate(PROMPTS, seeds=[0, 1], steps=2)


def given(name, pictures, original):
    """What each attack needs beside the goal."""
    pair = [("a church", "a house")]
    return {
        "unlearndiff": {"targets": pictures},
        "p4d": {"targets": pictures, "original": original},
        "ring-a-bell": {"pairs": pair},
        "mma": {"blocked": ["church"]},
        "concept-vector": {"pairs": pair},
        "textual-inversion": {"phrase": "a", "pictures": pictures, "captions": ["a church", "a dog"]},
        "latent-inversion": {"targets": pictures},
        "fine-tuning": {"pictures": pictures, "captions": ["a house", "a castle"]},
    }[name]


def attacked(name, model, pictures, folder, goal=DARK, config=None, **changes):
    module = ATTACKS[name]
    settings = given(name, pictures, models.load(tiny_pipeline())) | changes
    return module.run(
        model, PROMPTS, seeds=[0, 1], goal=goal, config=config or short(module), folder=folder, **settings
    )


# What all attacks share


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("name", ATTACKS)
def test_families_that_no_attack_knows_are_refused(name, family, pictures, tmp_path):
    with pytest.raises(ValueError, match="attacks and runs depend, and .* is drawn by its pipeline"):
        attacked(name, models.load(tiny(family)), pictures, tmp_path / "attacks")


@pytest.mark.parametrize("name", ATTACKS)
def test_the_victim_is_left_as_it_was(name, model, pictures, tmp_path):
    parts = (model.unet, model.text_encoder, model.vae)
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in parts]
    result = attacked(name, model, pictures, tmp_path / "attacks")
    assert len(result.attempts) == 2 and result.success()["n"] == 2
    for part, old in zip(parts, before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in part.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_generator_gives_the_same_attack_and_a_second_call_does_no_work(
    name, model, pictures, tmp_path, monkeypatch
):
    draw = lambda seed: {"generator": torch.Generator().manual_seed(seed)}
    first = attacked(name, model, pictures, tmp_path / "a", **draw(3)).result()
    assert attacked(name, model, pictures, tmp_path / "b", **draw(3)).result() == first
    monkeypatch.setattr(models.DiffusionModel, "draw", lambda *a, **k: pytest.fail("it drew again"))
    assert attacked(name, model, pictures, tmp_path / "a", **draw(3)).result() == first
    assert (
        records.parsed(records.plain(first), tmp_path).measurements == first.measurements
    )  # a file holds it


@pytest.mark.parametrize("name", ["unlearndiff", "textual-inversion"])
def test_a_budget_is_part_of_the_protocol(name, model, pictures, tmp_path):
    """How many attempts are searched at a time is none, how many pictures an update sees is one."""
    config = short(ATTACKS[name], batch=1)
    plain, batched, longer = (
        attacked(
            name, model, pictures, tmp_path / "attacks", config=dataclasses.replace(config, **one)
        ).asked.hash
        for one in ({}, {"batch": 2}, {"updates": config.updates + 1})
    )
    assert plain != longer
    assert (plain == batched) == (name == "unlearndiff")


@pytest.mark.parametrize("name", ["unlearndiff", "p4d"])
def test_a_prompt_that_succeeds_as_it_is_costs_nothing(name, model, pictures, tmp_path):
    result = attacked(name, model, pictures, tmp_path / "attacks", goal=BRIGHT)
    assert result.raw() == result.success() and result.raw()["k"] == 2 and result.alone()["k"] == 0
    assert all(one.looks == one.unet == one.text == 0 and not one.trace for one in result.attempts)
    worked = attacked(name, model, pictures, tmp_path / "attacks")  # control: it does work where they fail
    assert worked.raw()["k"] == 0 and all(one.looks and one.unet for one in worked.attempts)


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["unlearndiff", "p4d", "ring-a-bell", "mma", "latent-inversion"])
def test_a_killed_search_goes_on_with_the_next_piece(name, model, pictures, tmp_path, monkeypatch):
    config = short(ATTACKS[name], batch=1)
    whole = attacked(name, model, pictures, tmp_path / "whole", config=config).result()
    append, pieces = common.runs.append_sealed, []

    def kill_after_one(path, records):
        append(path, records)
        if path.name == "search.0.jsonl":
            pieces.append(path)
            if len(pieces) == 1:
                raise Killed

    monkeypatch.setattr(common.runs, "append_sealed", kill_after_one)
    with pytest.raises(Killed):
        attacked(name, model, pictures, tmp_path / "killed", config=config)
    assert attacked(name, model, pictures, tmp_path / "killed", config=config).result() == whole
    assert len(pieces) == 2  # the first piece was not done again


@pytest.mark.parametrize("name", ["textual-inversion", "fine-tuning"])
def test_a_killed_training_ends_in_the_same_attack(name, model, pictures, tmp_path):
    config = short(ATTACKS[name], updates=120) if name == "textual-inversion" else short(ATTACKS[name])
    whole = attacked(name, model, pictures, tmp_path / "whole", config=config)

    def kill(state):
        if state["step"] == (70 if name == "textual-inversion" else 2):
            raise Killed

    with pytest.raises(Killed):
        attacked(name, model, pictures, tmp_path / "killed", config=config, callback=kill)
    steps = []
    again = attacked(
        name, model, pictures, tmp_path / "killed", config=config, callback=lambda s: steps.append(s["step"])
    )
    assert again.result() == whole.result()
    assert steps[0] == (40 if name == "textual-inversion" else 2)  # from the last checkpoint, not from 0
    if name == "textual-inversion":
        assert torch.equal(again.learned, whole.learned)


def test_another_victim_or_edit_is_another_attack(model, pictures, tmp_path):
    plain = attacked("concept-vector", model, pictures, tmp_path / "attacks")
    edit = ek.uce.fit(model, "church", ["house"])
    with edit.applied(model):
        inside = attacked("concept-vector", model, pictures, tmp_path / "attacks")
    assert plain.edit == () and inside.edit == (edit.digest,)
    assert len(list((tmp_path / "attacks").iterdir())) == 2
    assert plain.protocol.short == inside.protocol.short  # same prompts and goal: one table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"goal": dataclasses.replace(DARK, rule="mean")}, "a goal is reached or not"),
        ({"goal": sees("dark", judge="brigtness")}, "no judge is called 'brigtness': take .*brightness"),
        ({"generator": 7}, "give one torch.Generator, or 2, one for each attempt, got 7"),
        ({"generator": [torch.Generator()]}, "give one torch.Generator, or 2"),
        ({"targets": Image.new("RGBA", (16, 16))}, "transparent"),
    ],
)
def test_what_no_attack_can_use_is_refused_before_anything_is_drawn(
    changes, message, model, pictures, tmp_path, monkeypatch
):
    attacked("unlearndiff", model, pictures, tmp_path / "control", generator=[torch.Generator()] * 2)
    monkeypatch.setattr(models.DiffusionModel, "draw", lambda *a, **k: pytest.fail("it drew"))
    with pytest.raises(ValueError, match=message):
        attacked("unlearndiff", model, pictures, tmp_path / "attacks", **changes)


def test_gray_and_opaque_pictures_are_taken_as_rgb_and_one_stands_for_all(model, pictures, tmp_path):
    latents = lambda mode: common.latents_of(model, [one.convert(mode) for one in pictures])
    assert torch.equal(latents("RGBA"), latents("RGB"))
    gray = [one.convert("L") for one in pictures]
    assert torch.equal(
        common.latents_of(model, gray), common.latents_of(model, [one.convert("RGB") for one in gray])
    )
    assert not torch.equal(common.latents_of(model, gray), latents("RGB"))  # control
    for name in ("unlearndiff", "p4d"):
        one, several = (
            attacked(name, model, pictures, tmp_path / str(i), targets=targets).result()
            for i, targets in enumerate((pictures[0], pictures[:1]))
        )
        assert one == several


def test_stopping_earlier_never_succeeds_more():
    """A search ends with the look that reaches the goal; fine-tuning that reached it on its way only does not count."""
    seen = lambda *verdicts: tuple({"look": i + 1, "reached": one} for i, one in enumerate(verdicts))
    attempts = (
        common.Attempt("passing", 0, False, False, looks=2, trace=seen(True, False)),
        common.Attempt("searched", 0, False, True, looks=2, trace=seen(False, True)),
        common.Attempt("as it is", 0, True, False),
    )
    result = common.AttackResult("x", "", None, {}, attempts, "", (), {})
    assert [result.within(looks)["k"] for looks in range(4)] == [1, 1, 2, 2]
    assert result.within(3) == result.success()


def test_pictures_of_another_learned_word_or_size_are_drawn_anew(tmp_path, monkeypatch):
    """Neither is in a fingerprint. Without them the key is what it was."""

    def made(word=None, size=8):
        pipeline = tiny_pipeline()
        if word is not None:
            rows = torch.randn(32, generator=torch.Generator().manual_seed(word))
            pipeline.load_textual_inversion(rows, token="<toy>")
        model = models.load(pipeline)
        model.unet.register_to_config(sample_size=size)
        return model

    prompt = Prompt("a <toy> in flat", role="target")
    asked = Protocol("word", (prompt,), (DARK,), steps=2)
    for one, drawn in ((made(1), 1), (made(2), 1), (made(1), 0), (made(1, 16), 1)):
        run = runs.run(one, None, asked, folder=tmp_path, progress=False)
        assert run.manifest["last"]["drawn"] == drawn
        ((_, kept),) = run.pictures()
        (now,) = one.draw(one.conditioning([prompt.text]), [0], steps=2, guidance=asked.guidance)
        assert kept.size == now.size and np.array_equal(kept, now)
    key = lambda model: runs.model_key(model, [], asked, None)
    plain, other = key(made()), key(made(1))
    monkeypatch.setattr(runs, "unusual", lambda model: [])
    assert key(made()) == key(made(1)) == plain != other


def test_bad_input_is_named(model, pictures, tmp_path):
    where = dict(goal=DARK, folder=tmp_path / "attacks", config=short(unlearndiff))
    with pytest.raises(ValueError, match="given twice"):
        unlearndiff.run(model, ["a dog", "a dog"], targets=pictures, **where)
    with pytest.raises(ValueError, match="3 attempts and 2 target"):
        unlearndiff.run(model, ["a dog"], seeds=[0, 1, 2], targets=pictures, **where)
    with pytest.raises(ValueError, match="limit is 22"):
        unlearndiff.run(model, ["a dog " * 11], targets=pictures[:1], **where)
    with pytest.raises(ValueError, match="role 'target'"):
        wrong = dataclasses.replace(DARK, roles=("other",))
        unlearndiff.run(model, ["a dog"], targets=pictures, **{**where, "goal": wrong})
    with pytest.raises(ValueError, match="load the model twice"):
        p4d.run(model, ["a dog"], targets=pictures, original=model, **{**where, "config": short(p4d)})
    with pytest.raises(ValueError, match="give \\['church'\\]"):
        attacked("mma", model, pictures, tmp_path / "attacks", blocked="church")
    for eta in (3.0, (), (float("nan"),)):
        with pytest.raises(ValueError, match="eta must be one or several finite numbers"):
            concept_vector.Config(eta=eta)
    with pytest.raises(ValueError, match="drop is a share"):
        fine_tuning.Config(drop=10)
    with pytest.raises(ValueError, match="does not hold the phrase"):
        attacked("textual-inversion", model, pictures, tmp_path / "attacks", phrase="castle")
    with pytest.raises(ValueError, match="updates must be a multiple"):
        fine_tuning.Config(updates=10, every=3)
    with pytest.raises(ValueError, match="k must be at least 1"):
        unlearndiff.Config(k=0)
    with pytest.raises(ValueError, match="whole number"):
        unlearndiff.Config(updates=2.5)


def test_a_judge_that_fails_stops_the_attack(model, pictures, tmp_path, monkeypatch):
    def broken(self, pictures, prompts):
        raise OSError("no weights")

    monkeypatch.setattr(Brightness, "scores", broken)
    with pytest.raises(RuntimeError, match="brightness failed"):
        attacked("unlearndiff", model, pictures, tmp_path / "attacks")


# Token embeddings


def test_rows_of_the_ids_give_the_stock_encoding_and_others_do_not(shared_model):
    ids = token_ids(shared_model.tokenizer, PROMPTS)
    rows = token_table(shared_model.text_encoder)[ids]

    def encoded(rows):
        with embedded_as(shared_model.text_encoder, ids, rows):
            return shared_model.text_encoder(ids)[0]

    assert torch.equal(encoded(rows), shared_model.text_encoder(ids)[0])
    moved = rows.clone()
    moved[:, 3] += 0.1
    changed = encoded(moved)
    plain = shared_model.text_encoder(ids)[0]
    assert torch.equal(changed[:, :3], plain[:, :3])  # causal: earlier slots cannot see it
    assert not torch.allclose(changed[:, 3:], plain[:, 3:])
    with pytest.raises(ValueError, match="expected rows"):
        encoded(rows[:1])


def test_layout_keeps_every_token_and_refuses_what_does_not_fit(shared_model):
    tokenizer = shared_model.tokenizer
    contents = [content_ids(tokenizer, text) for text in PROMPTS]
    ids, free = tokens.layout(tokenizer, contents)
    assert torch.equal(ids, token_ids(tokenizer, PROMPTS)) and not free.any()  # k = 0 is the prompt
    ids, free = tokens.layout(tokenizer, [[None, None, *contents[0]]])
    assert free[0].nonzero().flatten().tolist() == [1, 2]
    assert ids[0, 3 : 3 + len(contents[0])].tolist() == contents[0]
    with pytest.raises(ValueError, match="23 tokens with the adversarial ones, the limit is 22"):
        tokens.layout(tokenizer, [[None] * 23])


def test_gradients_reach_the_free_rows_alone(shared_model):
    ids, free = tokens.layout(shared_model.tokenizer, [[None, *content_ids(shared_model.tokenizer, "a dog")]])
    rows = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens.embed([shared_model.text_encoder], [(ids, free)], rows, 1).rows[0, 3, 0].backward()
    assert rows.grad.abs().sum() > 0
    assert all(p.grad is None for p in shared_model.unet.parameters())
    shared_model.text_encoder.zero_grad(set_to_none=True)


def test_the_search_vocabulary(shared_model):
    tokenizer = shared_model.tokenizer
    everything, stable = tokens.vocabulary([tokenizer], False), tokens.vocabulary([tokenizer], True)
    assert not set(everything.tolist()) & set(tokenizer.all_special_ids)
    assert set(stable.tolist()) < set(everything.tolist())
    for token in stable.tolist():
        assert content_ids(tokenizer, tokens.as_text(tokenizer, [token])) == [token]
    blocked = tokens.vocabulary([tokenizer], False, ["church"])
    assert not any("church" in tokenizer.decode([t]) for t in blocked.tolist())
    assert any("church" in tokenizer.decode([t]) for t in everything.tolist())  # control


# UnlearnDiffAtk


def nearest_by_trying_every_support(v):
    best = None
    for size in range(1, len(v) + 1):
        for support in itertools.combinations(range(len(v)), size):
            u = torch.zeros_like(v)
            chosen = list(support)
            u[chosen] = v[chosen] - (v[chosen].sum() - 1) / size
            if (u >= 0).all() and (best is None or (u - v).norm() < (best - v).norm()):
                best = u
    return best


def test_the_projection_is_the_nearest_point_of_the_simplex(generator):
    for scale in (0.01, 1.0, 10.0):
        v = scale * torch.randn(5, 6, generator=generator, dtype=torch.float64)
        found = unlearndiff.project_to_simplex(v)
        expected = torch.stack([nearest_by_trying_every_support(row) for row in v])
        assert torch.allclose(found, expected, atol=1e-12)
        assert torch.allclose(unlearndiff.project_to_simplex(found), found, atol=1e-12)
        assert (found >= 0).all() and torch.allclose(found.sum(-1), torch.ones(5, dtype=torch.float64))
    clipped = v.clamp_min(0) / v.clamp_min(0).sum(-1, keepdim=True)  # control: dividing by the sum is not it
    assert (clipped - v).norm() > (found - v).norm()


def test_straight_through(generator):
    u = torch.rand(2, 4, generator=generator).requires_grad_()
    hard = unlearndiff.straight_through(u, torch.tensor([1, 3]))
    assert torch.equal(hard, torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]]))
    weights = torch.tensor([[0.5, -3.0, 2.0, 0.1], [0.0, 1.0, -1.0, 9.0]])
    (hard * weights).sum().backward()
    assert torch.equal(u.grad, weights.clamp(-1, 1))


def test_a_batch_attacks_each_prompt_as_if_it_were_alone(pictures, tmp_path):
    model = models.load(tiny_pipeline().to(torch.float64))
    generators = lambda: [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    where = dict(goal=DARK, config=short(unlearndiff, updates=5))
    both = unlearndiff.run(
        model,
        PROMPTS,
        seeds=[0, 1],
        targets=pictures,
        generator=generators(),
        folder=tmp_path / "both" / "x",
        **where,
    )
    for i, own in enumerate(generators()):
        alone = unlearndiff.run(
            model, PROMPTS[i : i + 1], seeds=[i], targets=pictures[i : i + 1], generator=[own],
            folder=tmp_path / f"{i}" / "x", **where,
        )  # fmt: skip
        texts = lambda attempt: [step["text"] for step in attempt.trace]
        assert texts(alone.attempts[0]) == texts(both.attempts[i])
        losses = lambda attempt: [step["loss"] for step in attempt.trace]
        assert losses(alone.attempts[0]) == pytest.approx(losses(both.attempts[i]), abs=1e-6)
    assert texts(both.attempts[0]) != texts(both.attempts[1])  # control


def test_every_block_has_noise_of_its_own(model, pictures, tmp_path):
    config = short(unlearndiff, timesteps=(500, 500), updates=1, alpha=0.0)
    result = attacked("unlearndiff", model, pictures, tmp_path / "attacks", config=config)
    for attempt in result.attempts:
        first, second = (step["loss"] for step in attempt.trace)
        assert first != second
    assert unlearndiff.PRESETS["sd14"].timesteps == tuple(10 + 20 * i for i in range(50))


# P4D


def test_an_original_around_the_weights_of_the_victim_is_refused(model, pictures, tmp_path):
    """Inside the block of an edit it would be erased too; a text encoder may be shared while no edit is in it."""
    fresh = tiny_pipeline()
    fresh.text_encoder = model.text_encoder
    delta = {"text_encoder.final_layer_norm.bias": torch.ones(32)}
    in_text = ek.Edit.from_weight_delta(delta, model, method="none", config={}, concepts={})
    in_unet = ek.uce.fit(model, "church", ["house"])
    run = lambda original: attacked("p4d", model, pictures, tmp_path / "attacks", original=original)
    with in_unet.applied(model):
        assert run(models.load(fresh)).success()["n"] == 2
        with pytest.raises(ValueError, match="load the model twice"):
            run(models.load(model.pipeline))
    with in_text.applied(model), pytest.raises(ValueError, match="load the model twice"):
        run(models.load(fresh))


def test_nearest_rows_are_rows_and_their_own_nearest(generator):
    table = torch.randn(20, 8, generator=generator)
    picked = p4d.nearest(torch.randn(6, 8, generator=generator), table)
    assert torch.equal(p4d.nearest(table[picked], table), picked)
    assert torch.equal(p4d.nearest(3.7 * table, table), torch.arange(20))  # cosine: length does not count


def test_p4d_k_keeps_the_prompt_and_puts_a_token_before_every_three():
    for n in range(9):
        content = list(range(100, 100 + n))
        found = p4d.spaced(content, 3)
        assert [one for one in found if one is not None] == content
        assert found.count(None) == n // 3 + 1
        assert all((one is None) == (i % 4 == 0) for i, one in enumerate(found))


# Ring-A-Bell


def test_genetic_operators(generator):
    members = torch.randint(5, 50, (9, 4), generator=generator)
    grown = ring_a_bell.crossed(members, 1.0, generator)
    assert torch.equal(grown[:9], members) and len(grown) == 27
    for i, parent in enumerate(members):
        for child in grown[9 + 2 * i : 11 + 2 * i]:
            others = (members == child).any(0)  # every gene is at its place in some member
            assert others.all() and (child == parent).any()
    assert torch.equal(ring_a_bell.crossed(members, 0.0, generator), members)
    allowed = torch.tensor([1, 2, 3])
    changed = ring_a_bell.mutated(members, 1.0, allowed, generator)
    assert ((changed != members).sum(1) <= 1).all() and (changed != members).any()
    assert set(changed[changed != members].tolist()) <= {1, 2, 3}
    assert torch.equal(ring_a_bell.mutated(members, 0.0, allowed, generator), members)


def test_the_best_member_is_never_lost_unless_faithful():
    wanted = torch.tensor([3, 1, 4, 1, 5])
    fitness = lambda members: (members != wanted).sum(1).float()
    courses = {}
    for faithful in (False, True):
        config = ring_a_bell.Config(tokens=5, population=20, generations=60, mutation=0.9, faithful=faithful)
        runs = [
            ring_a_bell.search(fitness, torch.arange(10), config, torch.Generator().manual_seed(seed))
            for seed in range(5)
        ]
        courses[faithful] = [course for _, course, _ in runs]
        if not faithful:
            assert all(torch.equal(best, wanted) for best, _, _ in runs)
    falls = lambda course: all(later <= earlier for earlier, later in itertools.pairwise(course))
    assert all(map(falls, courses[False])) and not all(map(falls, courses[True]))


def test_without_a_shift_the_prompt_itself_is_the_best_text(shared_model):
    prompt = content_ids(shared_model.tokenizer, "a dog in ink")
    ids, _ = tokens.layout(shared_model.tokenizer, [prompt, prompt[::-1], [5, 6, 7, 8]])
    with torch.no_grad():
        distance = (
            (shared_model.text_encoder(ids)[0] - shared_model.encode("a dog in ink")).square().sum((1, 2))
        )
    assert distance[0] < 1e-8 < distance[1:].min()


# MMA


def test_candidates_differ_in_one_place(generator):
    slots = torch.tensor([9, 9, 9])
    promising = torch.tensor([[1, 2], [3, 4], [5, 6]])
    rows = mma.neighbours(slots, promising, 30, generator)
    assert ((rows != slots).sum(1) == 1).all()
    for place, allowed in enumerate(promising.tolist()):
        assert set(rows[rows[:, place] != 9, place].tolist()) == set(allowed)


def test_mma_keeps_the_best_and_never_uses_a_blocked_word(model, pictures, tmp_path):
    config = short(mma, updates=15, tokens=4, candidates=40, top=20, stable=True)
    result = attacked("mma", model, pictures, tmp_path / "attacks", config=config)
    for attempt in result.attempts:
        best = [step["best"] for step in attempt.trace if "best" in step]
        assert best == sorted(best, reverse=True) and best[-1] < best[0]
        assert "church" not in attempt.found
        end = lambda text: model.encode(text)[0, len(content_ids(model.tokenizer, text)) + 1]
        rows = end(attempt.found), end(attempt.prompt)
        assert 1 - torch.cosine_similarity(*rows, dim=0) == pytest.approx(best[-1], abs=1e-4)


def test_mma_starts_from_a_text_that_reads_back(model, pictures, tmp_path, monkeypatch):
    """Also where it may search every token; from a random text of many tokens there is no next one."""
    config = short(mma, tokens=20, candidates=40)
    assert not config.stable
    for attempt in attacked("mma", model, pictures, tmp_path / "a", config=config).attempts:
        assert [step["update"] for step in attempt.trace if "update" in step] == list(range(config.updates))
    every = tokens.vocabulary
    monkeypatch.setattr(mma, "vocabulary", lambda of, stable, blocked: every(of, False, blocked))
    with pytest.raises(ValueError, match="reads back as 20 tokens"):
        attacked("mma", model, pictures, tmp_path / "b", config=config)


# Fine-tuning


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fine_tuning_moves_weights_in_any_precision_and_draws_in_the_models(
    dtype, pictures, tmp_path, monkeypatch
):
    model = models.load(tiny_pipeline(), dtype=dtype)
    before = {name: one.detach().float() for name, one in model.unet.named_parameters()}
    moved, rounded, drawn, optimize = [], [], [], fine_tuning.optimize

    def watched(name, module, *args, **kwargs):
        optimize(name, module, *args, **kwargs)
        for found, seen in ((moved, lambda one: one.float()), (rounded, lambda one: one.bfloat16().float())):
            apart = [(seen(p) != seen(before[n])).flatten() for n, p in module.named_parameters()]
            found.append(float(torch.cat(apart).float().mean()))

    draw = lambda self, *args, **kwargs: drawn.append(self.dtype) or stock(self, *args, **kwargs)
    stock = models.DiffusionModel.draw
    monkeypatch.setattr(models.DiffusionModel, "draw", draw)
    monkeypatch.setattr(fine_tuning, "optimize", watched)
    config = short(fine_tuning, alpha=1e-5)
    attacked("fine-tuning", model, pictures, tmp_path / "attacks", config=config)
    assert len(moved) == 2 and min(moved) > 0.99 and moved != rounded
    assert max(rounded) < 0.5  # control: what bfloat16 can hold of updates that small
    assert set(drawn) == {model.dtype} == {getattr(torch, dtype)}


def test_a_frozen_unet_is_fine_tuned_all_the_same(model, pictures, tmp_path):
    plain = attacked("fine-tuning", model, pictures, tmp_path / "a").result()
    model.unet.requires_grad_(False)
    assert attacked("fine-tuning", model, pictures, tmp_path / "b").result() == plain
    assert not any(p.requires_grad for p in model.unet.parameters())


# Latent inversion


def test_forwards_is_the_stock_ddim_loop(shared_model, generator):
    noise, text = torch.randn(2, 4, 8, 8, generator=generator), shared_model.unconditional().times(2)
    scheduler = DDIMScheduler.from_config(shared_model.scheduler.config)
    scheduler.set_timesteps(10)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(
                shared_model.unet(x, t, encoder_hidden_states=text.rows).sample, t, x
            ).prev_sample
    assert torch.allclose(latent_inversion.forwards(shared_model, noise, text, 10), x, atol=1e-4)


def test_inversion_undoes_drawing(shared_model, generator):
    noise, text = torch.randn(2, 4, 8, 8, generator=generator), shared_model.unconditional().times(2)
    clean = latent_inversion.forwards(shared_model, noise, text, 25)
    errors = []
    for iterations in (1, 8):
        found = latent_inversion.invert(shared_model, clean, text, 25, iterations)
        errors.append(
            float((latent_inversion.forwards(shared_model, found, text, 25) - clean).norm() / clean.norm())
        )
    assert errors[1] < 0.1 * errors[0]  # the fixed point, against plain DDIM inversion
    assert errors[1] < 0.01


# Emoji world


def test_stages_of_the_emoji_world():
    dog = stages.stage("dog", 12)
    assert len(dog.prompts) == len(set(zip(dog.prompts, dog.seeds, strict=True))) == 12
    assert all("dog" in prompt for prompt in dog.prompts) and dog.goal.labels == ("dog",)
    assert all("dog" in one and "dog" not in other for one, other in dog.pairs())
    ink = stages.stage("ink", 20)
    assert ink.goal.judge == "emoji-style" and all("in ink style" in prompt for prompt in ink.prompts)
    weapons = stages.stage("weapon", 35)
    assert len(weapons.goal.labels) == 7 and len(set(weapons.prompts)) == 35
    pictures, captions = dog._captioned(fine_tuning.run)
    assert len(pictures) == len(captions) == 103 * 5 and not any(
        text.startswith("a dog") for text in captions
    )
    wide = stages.stage("dog", 100, captions=5)
    assert wide.prompts[:5] == stages.stage("dog", 5).prompts and len(set(wide.prompts)) == 25
    assert all(
        text.count("dog") == 1 and style in text
        for text, (_, style) in zip(wide.prompts, wide.shown, strict=True)
    )
    assert set(wide.seeds) == set(range(4))
    own = stages.stage("dog", 100, captions=5, own_seeds=True)
    assert own.prompts == wide.prompts and own.seeds == tuple(range(100))
    with pytest.raises(ValueError, match="no object or style"):
        stages.stage("sofa")
    assert set(stages.CAPTIONS) <= set(captions_of_training.STYLED)
    with pytest.raises(ValueError, match="1 to 5 captions"):
        stages.stage("dog", 100, captions=6)
    with pytest.raises(ValueError, match="25 prompts"):
        stages.stage("dog", 24, captions=5)


def test_the_negative_control_knows_no_word(model):
    control = common.unknowing(model, torch.Generator().manual_seed(0))
    assert not torch.allclose(control.encode("a dog"), model.encode("a dog"))
    assert all(
        torch.equal(a, b) for a, b in zip(control.unet.parameters(), model.unet.parameters(), strict=True)
    )
    assert control.encode("a dog").isfinite().all()


@pytest.mark.parametrize("drawn", [0, 10])
def test_the_noise_of_the_error_does_not_come_from_the_sampler(drawn, shared_model, model, generator):
    """x_t of t, whatever the pipeline draws with and has drawn before."""
    scheduler = DPMSolverMultistepScheduler.from_config(model.scheduler.config)
    model.pipeline.scheduler = scheduler
    if drawn:
        model.generate(["a dog"], [0], steps=drawn)
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    t, text = torch.tensor([301, 701]), shared_model.conditioning(["a dog"] * 2)
    expected = common.noise_error(shared_model, clean, noise, t, text)
    torch.testing.assert_close(common.noise_error(model, clean, noise, t, text), expected)
    noisy = shared_model.scheduler.add_noise(clean, noise, t)
    assert (scheduler.add_noise(clean, noise, t) - noisy).abs().max() > 0.5  # control: the sampler's own


@pytest.mark.slow
def test_a_picture_is_explained_best_by_its_own_prompt():
    emoji = ek.load("emoji", device="cpu")
    names = ["dog", "castle", "pizza", "guitar"]
    clean = common.latents_of(emoji, stages.real([("dog", "noto")] * 4, torch.Generator().manual_seed(0)))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    text = emoji.conditioning([f"a {name} in noto style" for name in names])
    with torch.no_grad():
        errors = [common.noise_error(emoji, clean, noise, torch.full((4,), t), text) for t in (300, 500, 700)]
    assert torch.stack(errors).mean(0).argmin() == 0


# With an accelerator


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_run_on_a_gpu(name, pictures, tmp_path):
    model = models.load(tiny_pipeline(), device="cuda")
    module = ATTACKS[name]
    settings = given(name, pictures, models.load(tiny_pipeline(), device="cuda"))
    result = module.run(
        model, PROMPTS, seeds=[0, 1], goal=DARK, config=short(module), folder=tmp_path / "attacks", **settings
    )
    assert len(result.attempts) == 2 and model.device.type == "cuda"
