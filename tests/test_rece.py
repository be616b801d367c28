"""RECE: theorems of the derivation, and the whole method against a literal per-layer loop in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import LENGTH, aligned, block, literal_erase, tiny_pipeline

import erasekit as ek
from erasekit import closed_form, models
from erasekit.closed_form import ContextMap
from erasekit.emoji import data
from erasekit.evaluate.protocols import weapons
from erasekit.layers import cross_attention_kv

D = 24
START = ek.uce.Config(lam=0.5, preserve_scale=1.0)
CONFIG = ek.rece.Config(start=START, epochs=3, lam=0.1)


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.fixture
def world(generator):
    """Weights, rows of a concept, and a map that erased them."""
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    weights = [draw(out, D) for out in (7, 24, 40)]
    sources, targets = draw(4, D), draw(4, D)
    return {
        "weights": weights,
        "gram": closed_form.weight_gram(weights),
        "c": sources,
        "c_star": targets,
        "t": closed_form.solve(sources, targets, draw(3, D), lam=0.3),
    }


def response(weights, t, rows):
    return torch.cat([rows @ (w @ t).T for w in weights], 1)


def derivation_objective(derived, world, lam, regularizer):
    """The sheet's objectives, one term for each weight."""
    t, c = world["t"].matrix(), world["c"]
    total = derived.new_zeros(())
    for w in world["weights"]:
        new = w @ t
        total = total + (derived @ new.T - c @ w.T).square().sum()
        if regularizer in ("surrogate", "both"):
            total = total + lam * ((derived - c) @ new.T).square().sum()
    pull = {"zero": 0 * c, "anchor": world["c_star"], "source": c, "both": c}.get(regularizer)
    return total if pull is None else total + lam * (derived - pull).square().sum()


@pytest.mark.parametrize("regularizer", ["zero", "anchor", "source", "surrogate", "both"])
def test_the_gradient_is_zero_at_the_derived_embedding(world, regularizer):
    lam = 0.7
    derived = ek.rece.derive(
        world["t"], world["gram"], world["c"], lam, regularizer=regularizer, targets=world["c_star"]
    )

    def gradient(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(derivation_objective(at, world, lam, regularizer), at)[0].norm()

    assert gradient(derived) < 1e-10 * gradient(world["c"])
    others = {"zero", "anchor", "source", "surrogate", "both"} - {regularizer}
    for other in others:  # control: each regularizer has a minimum of its own
        q = ek.rece.derive(
            world["t"], world["gram"], world["c"], lam, regularizer=other, targets=world["c_star"]
        )
        assert gradient(q) > 1e-3 * gradient(world["c"])


def test_without_a_regularizer_the_attack_is_the_inverse_map(world):
    derived = ek.rece.derive(world["t"], world["gram"], world["c"], 0.0)
    assert relative(derived, world["t"].inverse().apply(world["c"])) < 1e-8
    assert ek.rece.attack_residual(world["t"], world["gram"], derived, world["c"]) < 1e-8
    assert (
        ek.rece.attack_residual(world["t"], world["gram"], world["c"], world["c"]) > 0.1
    )  # control: no attack


def test_an_unedited_model_gives_the_concept_back(world):
    derived = ek.rece.derive(ContextMap.identity(D), world["gram"], world["c"], 0.0)
    assert relative(derived, world["c"]) < 1e-10


def test_a_larger_lam_shortens_the_embedding_and_weakens_the_attack(world):
    lams = [1e-6, 1e-3, 1e-1, 1e1, 1e3, 1e7]
    derived = [ek.rece.derive(world["t"], world["gram"], world["c"], lam) for lam in lams]
    sizes = [float(d.norm()) for d in derived]
    left = [ek.rece.attack_residual(world["t"], world["gram"], d, world["c"]) for d in derived]
    assert sizes == sorted(sizes, reverse=True) and left == sorted(left)
    assert sizes[-1] < 1e-3 * sizes[0] and left[0] < 0.01


def test_rows_are_derived_one_by_one_or_together(world):
    together = ek.rece.derive(world["t"], world["gram"], world["c"], 0.1)
    alone = [ek.rece.derive(world["t"], world["gram"], row[None], 0.1) for row in world["c"]]
    assert relative(together, torch.cat(alone)) < 1e-12


def test_attack_residual_is_about_all_weights(world, generator):
    guess = torch.randn(4, D, generator=generator, dtype=torch.float64)
    eye = torch.eye(D, dtype=torch.float64)
    seen = response(world["weights"], world["t"].matrix(), guess)
    wanted = response(world["weights"], eye, world["c"])
    found = ek.rece.attack_residual(world["t"], world["gram"], guess, world["c"])
    assert found == pytest.approx(relative(seen, wanted), rel=1e-10)


def test_single_pair_formula(generator):
    """Sheet 1.5: one pair, nothing preserved, lam = 0."""
    c, c_star = torch.randn(2, 1, D, generator=generator, dtype=torch.float64)
    gram = closed_form.weight_gram([torch.randn(50, D, generator=generator, dtype=torch.float64)])
    ridge = 0.4
    t = closed_form.solve(c, c_star, lam=ridge)
    expected = c - (c_star - c) * (c @ c.T) / (ridge + c @ c_star.T)
    assert relative(ek.rece.derive(t, gram, c, 0.0), expected) < 1e-10


def test_a_singular_derivation_is_an_error(world):
    thin = closed_form.weight_gram([torch.ones(2, D, dtype=torch.float64)])
    with pytest.raises(ValueError, match="raise lam"):
        ek.rece.derive(world["t"], thin, world["c"], 0.0)
    assert ek.rece.derive(world["t"], thin, world["c"], 0.1).isfinite().all()
    with pytest.raises(ValueError, match="targets"):
        ek.rece.derive(world["t"], world["gram"], world["c"], 0.1, regularizer="anchor")


# ---- the whole method -----------------------------------------------------------------------------------------


def literal_rece(model, erase, preserve, anchor, config):
    """Algorithm of the method sheet, section 2, on the weights themselves: every layer by itself, no shared matrix."""
    old = {name: layer.weight.detach().double() for name, layer in cross_attention_kv(model.unet).items()}
    kept = torch.cat([block(model, phrase) for phrase in [*preserve, ""]])
    if config.pairs == "start":
        loop = [aligned(model, phrase, anchor) for phrase in erase]
    else:
        loop = [(block(model, phrase), block(model, anchor)) for phrase in erase]
    start = [pair for phrase in erase for pair in zip(*aligned(model, phrase, anchor), strict=True)]
    s = config.start
    new = {n: literal_erase(w, start, kept, s.erase_scale, s.preserve_scale, s.lam) for n, w in old.items()}
    for _ in range(config.epochs):
        pairs = []
        for rows, anchors in loop:
            for c, c_star in zip(rows, anchors, strict=True):
                left = config.lam * torch.eye(len(c), dtype=torch.float64)
                right = torch.zeros_like(c)
                for name in old:
                    left = left + new[name].T @ new[name]
                    right = right + new[name].T @ (old[name] @ c)
                pairs.append((torch.linalg.inv(left) @ right, c_star))
        pairs += start if config.pairs == "held" else []
        new = {
            n: literal_erase(w, pairs, kept, config.erase_scale, config.lambda_1, config.lambda_2)
            for n, w in new.items()
        }
    return new


@pytest.mark.parametrize("pairs", ["positions", "start", "held"])
@pytest.mark.parametrize("erase", [["church"], ["church", "dog", "castle", "image", "garbage"]])
def test_agrees_with_the_literal_algorithm(shared_model, erase, pairs):
    config = dataclasses.replace(CONFIG, pairs=pairs)
    expected = literal_rece(shared_model, erase, ["house"], "art", config)
    states = []
    edit = ek.rece.fit(shared_model, erase, ["house"], anchor="art", config=config, callback=states.append)
    exact = states[-1]["context_map"]
    start = states[0]["context_map"]
    for name, layer in cross_attention_kv(shared_model.unet).items():
        w = layer.weight.detach().double()
        assert relative(exact.apply_to_weight(w), expected[name]) < 1e-6
        assert relative(edit.context_map.apply_to_weight(w), expected[name]) < 1e-3  # factors kept in float32
        assert relative(start.apply_to_weight(w), expected[name]) > 1e-2  # control: the rounds matter


def test_every_preset_pairs_as_the_authors(shared_model):
    """With a blank anchor the code sends the subject to the end token in its rounds, and UCE to the start token."""
    assert {config.pairs for config in ek.rece.PRESETS.values()} == {ek.rece.Config().pairs} == {"positions"}
    states = {"positions": [], "start": []}
    for pairs, seen in states.items():
        config = dataclasses.replace(CONFIG, pairs=pairs)
        ek.rece.fit(shared_model, "church", config=config, callback=seen.append)
    ours, theirs = states["start"][1], states["positions"][1]
    assert len(theirs["sources"]) == LENGTH and len(ours["sources"]) == LENGTH - 1
    assert torch.equal(theirs["sources"][1:], ours["sources"])
    assert (theirs["context_map"].matrix() - ours["context_map"].matrix()).norm() > 1e-2


def test_no_rounds_is_uce(shared_model):
    none = ek.rece.fit(shared_model, "church", ["house"], config=dataclasses.replace(CONFIG, epochs=0))
    uce = ek.uce.fit(shared_model, "church", ["house"], config=START)
    assert all(torch.equal(none.tensors[k], uce.tensors[k]) for k in uce.tensors)


def test_every_round_weakens_the_attack_it_erases(shared_model):
    states = []
    ek.rece.fit(shared_model, "church", ["house"], config=CONFIG, callback=states.append)
    assert [s["step"] for s in states] == [0, 1, 2, 3]
    for state in states[1:]:
        assert state["attack_residual"] > state["attack_residual_before"]
        assert state["derived"].shape == state["sources"].shape and 0 < state["norm_ratio"] < float("inf")


def test_order_of_concepts_and_repetition(shared_model):
    one = ek.rece.fit(shared_model, ["church", "dog"], ["house", "castle"], config=CONFIG)
    other = ek.rece.fit(shared_model, ["dog", "church", "dog"], ["castle", "house"], config=CONFIG)
    assert relative(one.context_map.matrix(), other.context_map.matrix()) < 1e-5


def test_a_concept_that_is_its_anchor_stays(shared_model):
    """Without lam a round derives the concept itself, and maps it to itself."""
    states = []
    ek.rece.fit(
        shared_model,
        "church",
        anchor="church",
        config=dataclasses.replace(CONFIG, lam=0.0),
        callback=states.append,
    )
    for state in states:
        assert relative(state["context_map"].matrix(), torch.eye(32, dtype=torch.float64)) < 1e-8


def test_nothing_to_preserve(shared_model):
    config = dataclasses.replace(CONFIG, start=dataclasses.replace(START, preserve_null=False))
    with_null = ek.rece.fit(shared_model, "church", config=CONFIG)
    without = ek.rece.fit(shared_model, "church", config=config)
    null = block(shared_model, "")
    drift = lambda edit: relative(edit.context_map.apply(null), null)
    assert drift(with_null) < drift(without)


@pytest.mark.slow
def test_a_round_gives_a_part_of_the_word_back_unless_it_is_held():
    """How much of the way from the anchor to the word is left, after UCE as RECE's authors have it and after a round.

    The round erases its derived embedding all the same, and what is kept stays. Control: where only the empty prompt is
    kept, as by the authors, the word stays erased, and the other words are lost instead.
    """
    model = models.load("emoji", device="cpu")
    others = [one.name for one in data.concepts() if one.name not in weapons().erased]
    blank, word = block(model, ""), block(model, "pistol")
    other = torch.cat([block(model, name) for name in others])
    way = (word - blank)[1:]

    def after(kept, **changes):
        states = []
        config = dataclasses.replace(CONFIG, start=ek.uce.PRESETS["sd14-object"], **{"epochs": 1} | changes)
        ek.rece.fit(model, "pistol", kept, config=config, callback=states.append)
        t = states[-1]["context_map"]
        left = float(((t.apply(word) - blank)[1:] * way).sum() / way.square().sum())
        return left, relative(t.apply(other), other), states[-1].get("attack_residual")

    uce, _, _ = after(others, epochs=0)
    rece, moved, erased = after(others)
    held, held_moved, held_erased = after(others, pairs="held")
    alone, lost, alone_erased = after([])
    assert min(erased, held_erased, alone_erased) > 1  # 0: the edited model sees the concept in c'
    assert max(abs(uce), abs(held), abs(alone)) < 0.1 < 0.2 < rece
    assert max(moved, held_moved) < 0.05 < 0.3 < lost


def test_many_concepts_take_the_dense_path(shared_model):
    """More rows than dimensions: T - I is kept as one d x d matrix, and it is the same map."""
    words = ["church", "dog", "house", "castle", "image"]
    config = dataclasses.replace(CONFIG, epochs=1)
    expected = literal_rece(shared_model, words, [], "art", config)
    states = []
    ek.rece.fit(shared_model, words, anchor="art", config=config, callback=states.append)
    assert states[-1]["context_map"].rank <= 32
    for name, layer in cross_attention_kv(shared_model.unet).items():
        found = states[-1]["context_map"].apply_to_weight(layer.weight.detach().double())
        assert relative(found, expected[name]) < 1e-6


def test_an_attacker_with_both_models_undoes_the_edit():
    """Sheet 1.4(3): T is found by least squares from the two sets of weights, and T^-1 c draws the concept again.

    In float64: three rounds leave T so ill-conditioned that in single precision its inverse is mostly rounding.
    """
    model = models.load(tiny_pipeline(), dtype=torch.float64)
    edit = ek.rece.fit(model, "church", ["house"], config=CONFIG)
    layers = cross_attention_kv(model.unet)
    original = torch.cat([layer.weight.detach().double() for layer in layers.values()])
    with edit.applied(model):
        edited = torch.cat([layer.weight.detach().double() for layer in layers.values()])
    recovered = torch.linalg.lstsq(original, edited).solution
    assert relative(recovered, edit.context_map.matrix()) < 1e-4
    prompt, uncond = model.encode("church"), model.encode("")[0]
    attack = torch.linalg.solve(recovered, prompt[0].T).T[None]
    free = torch.linalg.solve(recovered, uncond.T).T
    as_array = lambda pictures: np.asarray(pictures[0]).astype(int)
    before = as_array(model.draw(prompt, [0], steps=4))
    with edit.applied(model):
        naive = as_array(model.draw(prompt, [0], steps=4))
        attacked = as_array(model.draw(attack, [0], steps=4, uncond=free))
    assert np.abs(attacked - before).mean() < 0.2 * np.abs(naive - before).mean()


def test_lora_and_projections_for_stock_code(model, tmp_path):
    from safetensors.torch import load_file

    edit = ek.rece.fit(model, "church", ["house"], config=CONFIG)
    file = edit.to_projections(tmp_path / "kv.safetensors")
    state = load_file(file)
    assert set(state) == set(cross_attention_kv(model.unet))
    stock = tiny_pipeline()
    missing = stock.unet.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    with edit.applied(model):
        for name, layer in cross_attention_kv(model.unet).items():
            assert torch.equal(stock.unet.get_parameter(name), layer.weight)
    for name, layer in cross_attention_kv(model.unet).items():
        assert not torch.equal(stock.unet.get_parameter(name), layer.weight)  # control


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": -1.0}, "lam must be at least 0"),
        ({"lam": "1"}, "lam must be at least 0, got '1'"),
        ({"lambda_1": float("nan")}, "lambda_1 must be"),
        ({"epochs": -1}, "epochs must be at least 0"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"regularizer": "ridge"}, "regularizer must be one of"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        ek.rece.Config(**changes)


def test_presets_are_the_settings_of_the_readme():
    assert {"emoji", "sd14-nudity", "sd14-unsafe", "sd14-artist", "sd14-object"} <= set(ek.rece.PRESETS)
    nudity, artist = ek.rece.PRESETS["sd14-nudity"], ek.rece.PRESETS["sd14-artist"]
    assert (nudity.epochs, nudity.lam, nudity.start.lam) == (3, 0.1, 0.5)
    assert (artist.epochs, artist.lam, artist.start.preserve_scale) == (1, 1e-3, 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    cpu, gpu = models.load(tiny_pipeline()), models.load(tiny_pipeline(), device="cuda")
    one, other = (ek.rece.fit(m, "church", ["house"], config=CONFIG) for m in (cpu, gpu))
    assert relative(other.context_map.matrix(), one.context_map.matrix()) < 1e-2
    still = dataclasses.replace(CONFIG, start=dataclasses.replace(CONFIG.start, erase_scale=0.0))
    assert ek.rece.fit(gpu, "church", ["house"], config=still).kind == "context_map"
    half = models.load(tiny_pipeline(), device="cuda", dtype=torch.float16)
    with ek.rece.fit(half, "church", ["house"], config=CONFIG).applied(half):
        assert half.generate("church", steps=2)
