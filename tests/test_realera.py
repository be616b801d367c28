"""RealEra, a RECONSTRUCTION: the samplers as theorems, the closed form, the four switches, and what the LoRA aligns."""

import dataclasses
import itertools
from dataclasses import replace

import pytest
import torch
from conftest import WIDTH, literal_erase, tiny_pipeline

from erasekit import closed_form, miniatures, models
from erasekit.concepts import Concept, content_ids
from erasekit.layers import cross_attention_kv
from erasekit.methods import mace, realera
from erasekit.states import States

SHORT = realera.Config(
    anchor="house", templates=("{}", "a {}"), keep_templates=("a {}",), mode="shell", n=3, m=2, lora_n=2, lora_m=2,
    lambda_p=1e-2, directions=2, words=4, rank=1, lr=1e-2, iterations=4, batch=2, sampler=4, noises=2,
)  # fmt: skip
KEEP = ["dog", "castle"]
MODES = ("toward_gaussian", "shell", "subspace")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.states.FOLDER", tmp_path)


def fitted(model, config=SHORT, seed=0, erase="church", **more):
    seen = []
    generator = torch.Generator().manual_seed(seed)
    edit = realera.fit(model, erase, KEEP, config=config, generator=generator, callback=seen.append, **more)
    return seen, edit


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis_of(d, r=6, seed=5):
    return torch.linalg.qr(random(d, r, seed=seed))[0].T


# Neighbours and beyond


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(768,), (12, 64)])
def test_neighbours_lie_in_the_window_and_beyond_concepts_below_it(mode, shape, generator):
    config, e = replace(SHORT, mode=mode), random(*shape, seed=3)
    basis = basis_of(shape[-1]) if mode == "subspace" else None
    near = realera.mine(e, 40, config, generator, basis=basis)
    far = realera.mine(e, 40, config, generator, basis=basis, far=True)
    assert near.shape == far.shape == (40, *shape) and near.dtype == torch.float64
    flat = lambda x: x.reshape(len(x), -1)
    cosine = lambda x: torch.nn.functional.cosine_similarity(flat(x), e.flatten()[None], dim=1)
    assert (cosine(near) >= config.s_low - 1e-9).all() and (cosine(near) <= config.s_high + 1e-9).all()
    assert (cosine(far) < config.s_low).all()
    for x in (near, far):
        assert (flat(x - e).norm(dim=1) <= config.radius * e.norm() * (1 + 1e-9)).all()
    assert cosine(near).std() > 0.05  # not all at one place


def test_exact_cosine_and_distance(generator):
    e, c, a = (
        random(50),
        torch.tensor([-0.2, 0.1, 0.5, 0.9]).double(),
        torch.tensor([0.8, 1.0, 1.2, 1.0]).double(),
    )
    x = realera.at_cosine(e, c, a, realera._across(e[None], 4, generator, None))
    assert torch.allclose(torch.nn.functional.cosine_similarity(x, e[None], dim=1), c, atol=1e-9)
    assert torch.allclose((x - e).norm(dim=1), e.norm() * (1 + a**2 - 2 * a * c).sqrt(), atol=1e-9)


def test_subspace_neighbours_stay_in_it(generator):
    e, basis = random(64), basis_of(64)
    x = realera.mine(e, 20, replace(SHORT, mode="subspace"), generator, basis=basis)
    span = torch.linalg.qr(torch.cat([e[None], basis]).T)[0]
    assert torch.allclose(x @ span @ span.T, x, atol=1e-9)
    isotropic = realera.mine(e, 20, SHORT, generator)
    assert (isotropic - isotropic @ span @ span.T).norm() > 0.5 * e.norm()


def test_rays_are_accepted_as_often_as_the_sheet_says(generator, monkeypatch):
    """77 x 768 numbers, ||e|| = 245, D = 400: 0.26 neighbours, 0.45 beyond."""
    e = torch.nn.functional.normalize(random(77 * 768, seed=77), dim=0) * 245
    tried, similarity = [], torch.nn.functional.cosine_similarity
    monkeypatch.setattr(
        realera.F, "cosine_similarity", lambda *a, **k: tried.append(similarity(*a, **k)) or tried[-1]
    )
    config = replace(SHORT, mode="toward_gaussian", radius=400 / 245)
    realera.mine(e, 100, config, generator)
    cosine = torch.cat(tried)
    assert len(cosine) >= 400
    near, far = ((cosine >= 0.5) & (cosine <= 0.9)).double().mean(), (cosine < 0.5).double().mean()
    assert float(near) == pytest.approx(0.26, abs=0.06) and float(far) == pytest.approx(0.45, abs=0.07)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_neighbourhood_is_an_error_and_no_hang(mode, generator):
    config = replace(SHORT, mode=mode, radius=0.01)
    with pytest.raises(ValueError, match="no neighbours with these settings"):
        realera.mine(random(64, seed=77), 3, config, generator, basis=basis_of(64))


def test_same_generator_same_neighbours():
    draw = lambda seed: realera.mine(random(64, seed=77), 5, SHORT, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


# Related words


def test_the_subspace_is_spanned_by_words_and_spares_siblings(shared_model):
    concept = Concept("church", synonyms=("art",))
    words = realera.related(shared_model, concept, 5)
    assert len(words) == 5 and "church" not in [word for word, _ in words]
    assert [s for _, s in words] == sorted((s for _, s in words), reverse=True)
    basis = realera.subspace(shared_model, concept, replace(SHORT, words=5, directions=3))
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis)).double(), atol=1e-9) and len(basis) <= 3
    spared = realera.subspace(shared_model, concept, replace(SHORT, words=5, directions=3), ["castle"])
    rows = realera._last_rows(shared_model, ["church", "castle"])
    assert (spared @ (rows[1] - rows[0])).abs().max() < 1e-9
    assert (basis @ (rows[1] - rows[0])).abs().max() > 1e-3


# Rows


def test_rows_are_matched_from_the_last_token_backwards(shared_model):
    tokenizer = shared_model.tokenizer
    pieces, end = len(content_ids(tokenizer, "zebra")), lambda text: len(content_ids(tokenizer, text)) + 1
    one = realera.aligned(tokenizer, "a {} in ink", "zebra", "church")
    assert one.rows == [*range(2, 2 + pieces), end("a zebra in ink")]
    assert one.targets == [2] * pieces + [end("a church in ink")]  # surplus tokens go to the first
    two = realera.aligned(tokenizer, "a {}", "hot dog", "zebra")
    assert len(two.rows) == len(two.targets) == len(content_ids(tokenizer, "hot dog")) + 1
    blank = realera.aligned(tokenizer, "a {}", "church", " ")
    assert blank.targets[0] == 1  # the token before the slot


@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_only_the_rows_meant_are_perturbed_and_never_the_start(shared_model, scope, generator):
    e, rows = shared_model.encode("a church")[0], [2, 3]
    x = realera.perturbed(e, rows, 4, replace(SHORT, scope=scope), generator)
    changed = (x - e.double()).abs().amax((0, 2)) > 0
    assert not changed[0] and changed[rows].all()
    assert bool(changed[1]) == bool(changed[5]) == (scope == "sequence")


# Closed form


def test_agrees_with_the_literal_solution_of_every_layer(shared_model):
    pairs = [realera.aligned(shared_model.tokenizer, t, "church", "house") for t in ("{}", "a {}")]
    kept = shared_model.encode(["a dog", ""]).double().flatten(0, 1)
    given = [(realera.embedded(shared_model, pair), None) for pair in pairs]
    rows = realera.closed_rows(given, kept, SHORT, torch.Generator().manual_seed(3))
    found = realera.closed(*rows, SHORT)
    generator, sources, targets, beyond = torch.Generator().manual_seed(3), [], [], []
    for pair in pairs:
        e, g = shared_model.encode([pair.prompt, pair.other]).double()
        one, two = mace.beside(shared_model.tokenizer, pair.prompt, pair.other)
        sources += [*e[one], *e[pair.rows]]
        targets += [*g[two], *g[pair.targets]]
        for near in realera.perturbed(e, pair.rows, SHORT.n, SHORT, generator)[:, pair.rows]:
            sources += [*near]
            targets += [*g[pair.targets]]
        beyond += [
            *realera.perturbed(e, pair.rows, SHORT.m, SHORT, generator, far=True)[:, pair.rows].flatten(0, 1)
        ]
    held = [(SHORT.lambda_b / len(beyond)) ** 0.5 * b for b in beyond] + [
        SHORT.lambda_p**0.5 * k for k in kept
    ]
    for layer in cross_attention_kv(shared_model.unet).values():
        w = layer.weight.detach().double()
        literal = literal_erase(w, zip(sources, targets, strict=True), held, 1 / len(sources), 1.0, SHORT.lam)
        assert (w @ found.matrix() - literal).norm() < 1e-6 * literal.norm()


def test_neighbours_in_all_directions_fade_what_lies_across():
    """The attenuation law, predicted against measured."""
    d, n, m, sigma, tau, lambda_b, lam = 24, 20_000, 20_000, 0.5, 1.0, 0.7, 10.0
    e, g = random(d, seed=1) * 3, random(d, seed=2)
    near, far = e + sigma * random(n, d, seed=3), tau * random(m, d, seed=4)
    fitted = closed_form.solve(near, g.expand(n, -1), far, preserve_scale=lambda_b, lam=lam)
    across = random(d, seed=6)
    across = across - (across @ e) / (e @ e) * e
    kept = float(fitted.apply(across[None])[0] @ across / (across @ across))
    predicted = realera.attenuation(n, sigma, m, tau, lambda_b, lam)
    assert kept == pytest.approx(predicted, rel=0.03) and predicted == pytest.approx(0.7368, abs=2e-3)
    free = closed_form.solve(near, g.expand(n, -1), None, lam=lam)
    assert float(free.apply(across[None])[0] @ across / (across @ across)) < 0.1  # without the beyond term


def test_a_subspace_reaches_unseen_neighbours_and_spares_the_rest():
    d, e, g = 64, random(64, seed=1) * 3, random(64, seed=2)
    basis, generator = basis_of(d, 4), torch.Generator().manual_seed(0)
    results = {}
    for mode in ("shell", "subspace"):
        config = replace(SHORT, mode=mode)
        near = realera.mine(e, 30, config, generator, basis=basis)
        t = closed_form.solve(torch.cat([e[None], near]), g.expand(31, -1), None, lam=0.1)
        unseen = realera.mine(e, 30, replace(SHORT, mode="subspace"), generator, basis=basis)
        rest = random(100, d, seed=8)
        rest = rest - rest @ basis.T @ basis
        error = (t.apply(unseen) - g).norm(dim=1).mean() / (unseen - g).norm(dim=1).mean()
        results[mode] = float(error), float((t.apply(rest) - rest).norm() / rest.norm())
    assert results["subspace"][0] < 0.1 < 0.3 < results["shell"][0]
    assert results["subspace"][1] < results["shell"][1]


def test_a_concept_that_is_its_anchor_changes_nothing_without_neighbours(shared_model):
    config = replace(SHORT, anchor="church", lora=False, neighbour=False)
    _, edit = fitted(shared_model, config)
    assert torch.allclose(edit.context_map.matrix(), torch.eye(edit.context_map.d).double(), atol=1e-5)
    _, moved = fitted(shared_model, replace(config, neighbour=True))
    assert not torch.allclose(moved.context_map.matrix(), torch.eye(edit.context_map.d).double(), atol=1e-3)


# The LoRA


@pytest.mark.parametrize(
    "closed, lora, neighbour, beyond", [s for s in itertools.product([True, False], repeat=4) if s[0] or s[1]]
)
def test_all_switches(shared_model, closed, lora, neighbour, beyond):
    config = replace(SHORT, closed_form=closed, lora=lora, neighbour=neighbour, beyond=beyond, iterations=2)
    seen, edit = fitted(shared_model, config)
    assert edit.kind == ("weight_delta" if lora else "context_map")
    assert (seen[0]["step"] == -1) == closed
    if lora:
        assert ("near" in seen[-1]) == neighbour and ("far" in seen[-1]) == beyond
        total = seen[-1]["erase"] + seen[-1].get("near", 0.0) + seen[-1].get("far", 0.0)
        assert seen[-1]["loss"] == pytest.approx(total, rel=1e-5)


def test_at_the_start_beyond_concepts_are_where_they_were(shared_model):
    seen, _ = fitted(shared_model, replace(SHORT, closed_form=False))
    assert seen[0]["far"] < 1e-10 < 1e-8 < seen[-1]["far"]
    after_closed_form, _ = fitted(shared_model)
    assert after_closed_form[1]["far"] > 1e-8


@torch.no_grad()
def test_the_loss_is_that_of_the_equation_one_row_at_a_time(shared_model):
    config = replace(SHORT, lambda_n=0.7, lambda_far=0.3)
    unet = mace.adapter(shared_model, 1, torch.Generator().manual_seed(0))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.1)
    states = States(shared_model, ["church", "a church"], 0, 3.0, 4, "frozen", None)
    state = states.at(states.pick(torch.tensor([0, 1]), torch.Generator().manual_seed(1)))
    own, other = (
        shared_model.conditioning([name, f"a {name}"]).each(lambda x: x.float())
        for name in ("church", "house")
    )
    near, far = (own.rows[:, None] + random(2, k, *own.rows.shape[1:], seed=k).float() for k in (2, 3))
    found = realera.aligned_loss(unet, shared_model.unet, state, own, other, near, far, config)
    eps = lambda net, i, rows: net(state.sample[i : i + 1], state.timestep[i], rows[None]).sample
    apart = lambda one, two: float((one - two).square().mean())
    erase, by_near, by_far = [], [], []
    for i in range(2):
        wanted = eps(shared_model.unet, i, other.rows[i])
        erase.append(apart(eps(unet, i, own.rows[i]), wanted))
        by_near += [apart(eps(unet, i, rows), wanted) for rows in near[i]]
        by_far += [apart(eps(unet, i, rows), eps(shared_model.unet, i, rows)) for rows in far[i]]
    erase, by_near, by_far = (sum(one) / len(one) for one in (erase, by_near, by_far))
    by_hand = {"loss": erase + 0.7 * by_near + 0.3 * by_far, "erase": erase, "near": by_near, "far": by_far}
    assert {name: float(one) for name, one in found.items()} == pytest.approx(by_hand, rel=1e-4)
    assert min(by_hand.values()) > 1e-6


@pytest.mark.parametrize("target", ["mapping", "esd", "unconditional"])
def test_targets(shared_model, target, monkeypatch):
    monkeypatch.setattr(realera, "check_changed", lambda *args: None)  # there may be nothing to learn
    own = replace(SHORT, closed_form=False, neighbour=False, beyond=False, iterations=1, anchor="church")
    seen, _ = fitted(shared_model, replace(own, target=target))
    turned, _ = fitted(shared_model, replace(own, target=target, eta=-1.0))
    assert (seen[0]["erase"] < 1e-10) == (target == "mapping")  # the mapping concept is the concept itself
    assert (turned[0]["erase"] < 1e-10) == (target in ("mapping", "esd"))


def test_training_brings_the_concept_and_its_neighbours_to_the_target(shared_model):
    config = replace(SHORT, closed_form=False, iterations=80, lr=3e-2, batch=4, lambda_far=0.0)
    seen, _ = fitted(shared_model, config)
    mean = lambda name, part: sum(state[name] for state in part) / len(part)
    for name in ("erase", "near"):
        assert mean(name, seen[-20:]) < 0.9 * mean(name, seen[:20])


def test_the_edit_changes_keys_and_values_by_a_low_rank(model, tmp_path):
    before = {name: p.clone() for name, p in model.unet.named_parameters()}
    _, edit = fitted(model, replace(SHORT, closed_form=False))
    assert set(edit.tensors) == {f"unet.{name}" for name in cross_attention_kv(model.unet)}
    assert all(torch.linalg.matrix_rank(t.float(), rtol=1e-2) <= 1 for t in edit.tensors.values())
    for name, parameter in model.unet.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert edit.to_lora(tmp_path, model=model).exists()


def test_several_concepts_are_fused_and_same_seed(shared_model):
    seen, edit = fitted(shared_model, erase=["church", "art"])
    assert {state["concept"] for state in seen[1:]} == {"church", "art"}
    assert fitted(shared_model, erase=["church", "art"])[1].digest == edit.digest
    assert fitted(shared_model, seed=1, erase=["church", "art"])[1].digest != edit.digest
    assert edit.metadata["concepts"]["erase"] == ["church", "art"]
    alone = [fitted(shared_model, erase=name)[1] for name in ("church", "art")]
    apart = lambda one: sum(
        float((edit.tensors[n].float() - t.float()).norm()) for n, t in one.tensors.items()
    )
    assert all(apart(one) > 1e-2 for one in alone)


def test_neither_a_kept_word_nor_its_direction(shared_model):
    with pytest.raises(ValueError, match="raise words"):
        nearest = realera.related(shared_model, Concept("church"), 1)[0][0]
        realera.subspace(shared_model, Concept("church"), replace(SHORT, words=1), [nearest])


def test_where_siblings_span_everything_no_rounding_is_taken_for_a_direction(shared_model):
    """The control: half as many of them leave directions that are none of theirs."""
    words = [word for word in miniatures.WORDS if word != "church"]
    siblings = [f"{a} {b}" for a in words for b in words][:45]
    few = siblings[: WIDTH // 2]
    basis = realera.subspace(shared_model, Concept("church"), SHORT, few)
    rows = realera._last_rows(shared_model, ["church", *few])
    assert len(basis) == 2 and (basis @ (rows[1:] - rows[:1]).T).abs().max() < 1e-9
    with pytest.raises(ValueError, match="preserve fewer"):
        realera.subspace(shared_model, Concept("church"), SHORT, siblings)


@pytest.mark.parametrize("closed", [True, False])
def test_a_lora_that_changes_nothing_is_an_error(shared_model, closed):
    config = replace(SHORT, closed_form=closed, iterations=1)
    fitted(shared_model, config)  # the control
    with pytest.raises(ValueError, match="raise the learning rate"):
        fitted(shared_model, replace(config, lr=0.0))


def test_focal_time_steps(shared_model, monkeypatch):
    for focal in (True, False):
        nodes, at = [], States.at
        with monkeypatch.context() as patch:
            patch.setattr(
                States, "at", lambda self, picks, n=nodes, at=at: n.append(picks.node) or at(self, picks)
            )
            fitted(
                shared_model,
                replace(SHORT, focal=focal, sampler=10, iterations=25, batch=4, lora_n=1, lora_m=1),
            )
        inside = torch.cat(nodes).double()  # the nodes at t = 201 and 301, of ten
        assert (((inside == 2) | (inside == 3)).double().mean() > 0.7) == focal


def test_an_interrupted_call_goes_on_and_another_anchor_does_not(shared_model, monkeypatch):
    monkeypatch.setattr("erasekit.tuning.SAVE_EVERY", 2)
    whole, edit = fitted(shared_model)

    class Killed(Exception):
        pass

    def stop(state):
        if state["step"] == 3:
            raise Killed

    def killed(anchor):
        with pytest.raises(Killed):
            realera.fit(
                shared_model, "church", KEEP, anchor=anchor, config=SHORT, generator=torch.Generator().manual_seed(0),
                callback=stop,
            )  # fmt: skip

    killed("art")
    assert [state["step"] for state in fitted(shared_model)[0]] == [-1, 0, 1, 2, 3]
    killed("house")
    rest, resumed = fitted(shared_model)
    assert [state["step"] for state in rest] == [-1, 2, 3] and resumed.digest == edit.digest


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mode": "ball"}, "mode must be one of"),
        ({"scope": "word"}, "scope must be one of"),
        ({"target": "anchor"}, "target must be one of"),
        ({"s_low": 0.9, "s_high": 0.5}, "s_low < s_high"),
        ({"closed_form": False, "lora": False}, "nothing is erased"),
        ({"guidance": 1.0}, "guidance above 1"),
        ({"n": 0}, "n must be at least 1"),
        ({"eta": float("nan")}, "eta must be a finite number"),
        ({"eta": None}, "eta must be a finite number"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_it_says_that_it_is_a_reconstruction():
    assert "RECONSTRUCTION" in realera.__doc__ and "RECONSTRUCTION" in realera.Config.__doc__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    model = models.load(tiny_pipeline(), device="cuda", dtype="float16")
    seen, edit = fitted(model)
    assert all(state["loss"] == state["loss"] for state in seen[1:])
    with edit.applied(model):
        model.generate("a church", steps=2)
