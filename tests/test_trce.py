"""TRCE: which token is mapped to which, the closed form, the early ways, the hinge, and an edit of two stages."""

import csv
import dataclasses
from dataclasses import replace

import pytest
import torch
from conftest import literal_erase, tiny_pipeline
from diffusers import UNet2DConditionModel

import erasekit as ek
from erasekit import closed_form, miniatures, models, tuning
from erasekit.concepts import Concept, content_ids, slot_token
from erasekit.emoji import data
from erasekit.layers import cross_attention_kv, unet_parameters
from erasekit.methods import trce
from erasekit.sampling import walk
from erasekit.states import States

SHORT = trce.Config(
    templates=("{}", "a {}", "a {} in ink style"), steer_templates=("{}", "a {}"), keep_templates=("a {}",), eta=1e-2,
    lam=1e-6, sampler=6, early=3, noises=2, calm=2, iterations=4, lr=1e-3, batch=2, keep_batch=2, beta=4.0, weight=10.0,
    margin=0.5,
)  # fmt: skip
CHURCH = Concept("church", synonyms=("zebra church",), anchor="house")
KEEP = ["dog", "castle", "art"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.states.FOLDER", tmp_path)


def fitted(model, config=SHORT, seed=0, erase=CHURCH, preserve=KEEP, **more):
    seen = []
    generator = torch.Generator().manual_seed(seed)
    preserve = () if config.stages == "trajectory" else preserve
    edit = trce.fit(model, erase, preserve, config=config, generator=generator, callback=seen.append, **more)
    return seen, edit


@pytest.fixture
def given():
    return trce.pairs([CHURCH], None, SHORT)


def random_rows(n, d=16, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Which token


def test_the_first_end_token_is_found_from_ids(shared_model):
    tokenizer = shared_model.tokenizer
    for prompt in ("church", "a zebra, church", "", "church " * 22):
        at = trce.first_end(tokenizer, prompt)
        assert at == len(content_ids(tokenizer, prompt)) + 1
    # the code counts words, and looks too early wherever a word has pieces
    assert trce.first_end(tokenizer, "a church", faithful=True) == trce.first_end(tokenizer, "a church") == 3
    assert trce.first_end(tokenizer, "a zebra", faithful=True) == 3 < trce.first_end(tokenizer, "a zebra")


def test_the_end_token_sees_the_sentence_and_the_start_token_nothing(shared_model):
    one, other = shared_model.encode(["a church in ink style", "a dog in ink style"])
    assert torch.equal(one[0], other[0])
    end = trce.first_end(shared_model.tokenizer, "a church in ink style")
    assert not torch.allclose(one[end], other[end], atol=1e-3)


def test_pairs_put_both_phrases_into_every_template(given):
    assert len(given) == 6 and len({malicious for malicious, *_ in given}) == 6
    assert (
        "a zebra church in ink style",
        "zebra church",
        "a house in ink style",
        "a {} in ink style",
    ) in given
    again = trce.pairs([CHURCH, CHURCH], None, SHORT)
    assert again == given
    assert all(safe.endswith("dog") or "dog" in safe for _, _, safe, _ in trce.pairs([CHURCH], "dog", SHORT))


@pytest.mark.parametrize(
    "tokens, count", [(("eot",), 6), (("sot",), 6), (("last",), 6), (("eot", "sot"), 12)]
)
def test_rows_are_the_tokens_asked_for(shared_model, given, tokens, count):
    sources, targets = trce.rows(shared_model, given, replace(SHORT, tokens=tokens))
    assert len(sources) == len(targets) == count
    malicious, _, safe, _ = given[2]
    old, new = (shared_model.encode(prompt)[0].double() for prompt in (malicious, safe))
    at = {
        "sot": lambda p: 0,
        "last": lambda p: -1,
        "eot": lambda p: trce.first_end(shared_model.tokenizer, p),
    }
    first = 2 * len(tokens)
    for row, token in enumerate(tokens):
        assert torch.equal(sources[first + row], old[at[token](malicious)])
        assert torch.equal(targets[first + row], new[at[token](safe)])


def test_key_and_all_rows(shared_model, given):
    pieces = sum(len(content_ids(shared_model.tokenizer, phrase)) for _, phrase, _, _ in given)
    sources, targets = trce.rows(shared_model, given, replace(SHORT, tokens=("key",)))
    assert len(sources) == pieces and torch.equal(
        targets[0], shared_model.encode(given[0][2])[0, -1].double()
    )
    sources, _ = trce.rows(shared_model, given, replace(SHORT, tokens=("all",)))
    assert len(sources) == 6 * shared_model.tokenizer.model_max_length


@pytest.mark.parametrize("template", ["a house of {}", "a {} of house", "a housedog of {}"])
def test_the_key_is_the_phrase_in_the_slot_wherever_else_its_letters_stand(shared_model, template):
    """Of SD 1, and as many rows as elsewhere of SD 3; the control, a slot that comes first."""
    config = replace(SHORT, tokens=("key",), templates=(template,))
    given = trce.pairs([Concept("house", anchor="castle")], None, config)
    sources, _ = trce.rows(shared_model, given, config)
    at = slot_token(shared_model.tokenizer, template, "house")
    assert torch.equal(sources, shared_model.encode(given[0][0])[0, at : at + 1].double())
    sd3 = models.load(miniatures.pipeline("sd3"))
    count = lambda given: [len(one.sources) for one in trce.entry_rows(sd3, given, [""], {}, config).values()]
    assert count(given) == count([("a dog of house", "house", "a dog of castle", "a dog of {}")])


def test_other_tokens_do_not_matter_to_the_end_token(shared_model, given, monkeypatch):
    ends = {
        prompt: trce.first_end(shared_model.tokenizer, prompt)
        for m, _, safe, _ in given
        for prompt in (m, safe)
    }
    encode = type(shared_model).encode

    def disturbed(self, prompts, *args):
        rows = encode(self, prompts, *args).clone()
        for one, prompt in zip(rows, prompts, strict=True):
            keep = one[ends[prompt]].clone()
            one += torch.arange(len(one))[:, None]
            one[ends[prompt]] = keep
        return rows

    for tokens, same in ((("eot",), True), (("eot", "last"), False)):
        config = replace(SHORT, tokens=tokens)
        plain = trce.rows(shared_model, given, config)
        with monkeypatch.context() as patch:
            patch.setattr(type(shared_model), "encode", disturbed)
            other = trce.rows(shared_model, given, config)
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True)) == same


# Stage 1


def test_agrees_with_the_literal_solution_of_every_layer(shared_model, given):
    sources, targets = trce.rows(shared_model, given, SHORT)
    kept = shared_model.encode([f"a {name}" for name in KEEP] + [""]).double().flatten(0, 1)
    found = trce.solve(sources, targets, closed_form.condensed(kept), SHORT, 6, 4)
    for layer in cross_attention_kv(shared_model.unet).values():
        w = layer.weight.detach().double()
        literal = literal_erase(
            w, list(zip(sources, targets, strict=True)), kept, 1 / 6, SHORT.eta / 4, SHORT.lam
        )
        assert (w @ found.matrix() - literal).norm() < 1e-6 * literal.norm()


def test_a_safe_prompt_is_mapped_to_itself():
    e = random_rows(5)
    t = trce.solve(e, e, random_rows(7, seed=1), SHORT, 5).matrix()
    assert torch.allclose(t, torch.eye(16).double(), atol=1e-9)


def test_limits_of_eta():
    e, s, k = random_rows(5), random_rows(5, seed=1), random_rows(40, seed=2)
    exact = trce.solve(e, s, k[:2], replace(SHORT, eta=1e-9, lam=1e-9), 5)
    assert torch.allclose(exact.apply(e), s, atol=1e-5)
    frozen = trce.solve(e, s, k, replace(SHORT, eta=1e9), 5).matrix()
    assert torch.allclose(frozen, torch.eye(16).double(), atol=1e-5)
    middle = trce.solve(e, s, k, replace(SHORT, eta=1e-2), 5)
    assert (middle.apply(e) - s).norm() > 1e-3 and not torch.allclose(
        middle.matrix(), torch.eye(16).double(), atol=1e-3
    )


def test_rank_order_and_repetition():
    e, s, k = random_rows(5), random_rows(5, seed=1), random_rows(40, seed=2)
    whole = trce.solve(e, s, k, SHORT, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(trce.solve(e[order], s[order], k, SHORT, 5).matrix(), whole.matrix(), atol=1e-10)
    twice = trce.solve(torch.cat([e, e]), torch.cat([s, s]), k, SHORT, 10)  # 1/n
    assert torch.allclose(twice.matrix(), whole.matrix(), atol=1e-9)
    assert torch.linalg.matrix_rank(whole.matrix() - torch.eye(16).double(), rtol=1e-9) == 5
    assert not torch.allclose(trce.solve(e[:4], s[:4], k, SHORT, 4).matrix(), whole.matrix(), atol=1e-3)


def test_the_solution_is_a_minimum():
    e, s, k, w = random_rows(5), random_rows(5, seed=1), random_rows(40, seed=2), random_rows(8, seed=3)

    def objective(new):
        erased = ((new @ e.T - w @ s.T) ** 2).sum() / len(e)
        return erased + SHORT.eta * ((new - w) @ k.T).square().sum() + SHORT.lam * (new - w).square().sum()

    best = (w @ trce.solve(e, s, k, SHORT, 5).matrix()).requires_grad_(True)
    objective(best).backward()
    assert best.grad.norm() < 1e-9 * objective(w).sqrt()
    for seed in range(3):
        assert objective(best.detach() + 1e-3 * random_rows(8, seed=9 + seed)) > objective(best.detach())


def test_without_anything_kept_or_a_ridge_it_is_an_error():
    with pytest.raises(ValueError, match="raise lam"):
        trce.solve(random_rows(5), random_rows(5, seed=1), None, replace(SHORT, lam=0.0), 5)


def test_stage_one_is_a_map_of_the_text(model):
    seen, edit = fitted(model, replace(SHORT, stages="text"))
    assert edit.kind == "context_map" and edit.context_map.rank <= 6 and seen[0]["erase_residual"] < 0.5
    before = {name: p.clone() for name, p in model.unet.named_parameters()}
    with edit.applied(model):
        changed = {name for name, p in model.unet.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(cross_attention_kv(model.unet))
    draw = lambda m, text: m.unet(torch.ones(1, 4, 8, 8), 400, encoder_hidden_states=text).sample
    text = model.encode("a church")
    with torch.no_grad(), edit.applied(model):
        edited = draw(model, text)
    with torch.no_grad():
        assert torch.allclose(draw(model, edit.context_map.apply(text)), edited, atol=1e-4)


# The early ways


def points_of(model, config=SHORT, **more):
    return trce.trajectories(model, ["a church", "church"], ["a house", "house"], 5, config, **more)


def test_points_lie_on_the_way_and_know_their_directions(shared_model):
    points = points_of(shared_model)
    assert len(points.timesteps) == 2 * 2 * SHORT.early
    text, safe = shared_model.conditioning("church"), shared_model.conditioning("house")
    empty = shared_model.conditioning("")
    own = torch.Generator().manual_seed(5 + 7919 + 1)
    steps = list(
        walk(
            shared_model.unet, shared_model.scheduler, text, empty, [own], steps=6, guidance=3.0, size=(8, 8)
        )
    )
    mine = (points.prompts == 1).nonzero().flatten()[SHORT.early :]  # the second noise
    assert points.timesteps[mine].tolist() == [step["timestep"] for step in steps[: SHORT.early]]
    for row, step in zip(mine, steps, strict=False):
        assert torch.allclose(points.latents[row].float(), step["sample"][0], rtol=2e-3, atol=2e-3)
        with torch.no_grad():
            call = lambda c, step=step: (
                shared_model.unet(step["sample"], step["timestep"], encoder_hidden_states=c.rows).sample
            )
            wanted = SHORT.beta * (call(safe) - call(text))
        assert torch.allclose(points.directions[row].float(), wanted[0], rtol=2e-3, atol=2e-3)


def test_the_code_keeps_latents_one_step_ahead(shared_model):
    right, ahead = points_of(shared_model), points_of(shared_model, replace(SHORT, faithful=True))
    assert torch.equal(right.timesteps, ahead.timesteps)
    # within each way, what the code keeps at a step is what belongs to the next one
    first = (right.prompts == 0).nonzero().flatten()[: SHORT.early]
    assert torch.allclose(ahead.latents[first[:-1]], right.latents[first[1:]], atol=2e-3)
    assert not torch.allclose(ahead.latents[first], right.latents[first], atol=1e-2)


def test_the_cache_is_a_quarter_of_the_official_one(shared_model):
    """Half of the steps, latents and directions in half precision, against all steps and two in single precision."""
    points, latent = points_of(shared_model), 4 * 8 * 8
    ways, large = 4, (points.latents, points.directions)
    assert sum(one.nbytes for one in large) == ways * 6 * 2 * latent * 4 / 4
    small = points.nbytes - sum(one.nbytes for one in large)
    assert small == len(points.timesteps) * (4 + 8 + 8)  # at SD's shapes a thousandth
    assert trce.Config().early * 2 == trce.Config().sampler


def test_a_kill_costs_one_piece_and_damage_is_found(shared_model, tmp_path, monkeypatch):
    whole = points_of(shared_model, replace(SHORT, noises=5), folder=tmp_path)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    files[1].write_bytes(files[1].read_bytes()[:-7])  # truncated
    damaged = bytearray(files[0].read_bytes())
    damaged[-3] ^= 1
    drawn = []
    monkeypatch.setattr(trce, "walk", lambda *args, **kw: drawn.append(1) or walk(*args, **kw))
    again = points_of(shared_model, replace(SHORT, noises=5), folder=tmp_path)
    assert len(drawn) == 1
    files[0].write_bytes(damaged)
    third = points_of(shared_model, replace(SHORT, noises=5), folder=tmp_path)
    assert len(drawn) == 2
    for name in trce.TRAJECTORY:
        assert torch.equal(getattr(whole, name), getattr(again, name))
        assert torch.equal(getattr(whole, name), getattr(third, name))


# The hinge


def predictions(seed=0, n=3):
    return (random_rows(n, 4 * 4 * 4, seed + i).view(n, 4, 4, 4) for i in range(3))


def test_guidance_and_its_difference():
    text, safe, uncond = predictions()
    d, k = trce.directions(text, safe, uncond, 16.0)
    f = lambda c: uncond + 16.0 * (c - uncond)
    assert torch.allclose(f(text), text + 15.0 * (text - uncond))  # g = 15 of the code is beta = 16
    assert torch.allclose(d, 16.0 * (safe - text), atol=1e-4)
    assert torch.allclose(k, f(safe).square().mean((1, 2, 3)) - f(text).square().mean((1, 2, 3)), rtol=1e-4)


def test_the_hinge_is_the_difference_of_two_errors():
    text, safe, uncond = predictions()
    x = random_rows(3, 64, 9).view(3, 4, 4, 4) * 30
    d, k = trce.directions(text, safe, uncond, 4.0)
    f = lambda c: uncond + 4.0 * (c - uncond)
    error = lambda c: (x - f(c)).square().mean((1, 2, 3))
    for margin in (0.0, 0.5, 1000.0):
        expected = (error(safe) - error(text) + margin).relu()
        assert torch.allclose(trce.hinge(x, d, k, margin).double(), expected, rtol=1e-4, atol=1e-3)


def test_its_gradient_is_constant_where_it_is_active_and_nothing_elsewhere():
    text, safe, uncond = predictions()
    d, k = trce.directions(text, safe, uncond, 4.0)
    for x0 in (uncond, uncond + 0.1):
        x = x0.clone().requires_grad_(True)
        losses = trce.hinge(x, d, k + 1000, 0.0)  # active
        losses.sum().backward()
        assert torch.allclose(x.grad, -2 * d / 64, atol=1e-6)
    x = uncond.clone().requires_grad_(True)
    trce.hinge(x, d, k - 1000, 0.0).sum().backward()
    assert not x.grad.any()


def test_at_the_safe_direction_and_with_equal_prompts():
    text, safe, uncond = predictions()
    d, k = trce.directions(text, safe, uncond, 4.0)
    f_s = uncond + 4.0 * (safe - uncond)
    expected = (0.5 - d.square().mean((1, 2, 3))).relu()
    assert torch.allclose(trce.hinge(f_s, d, k, 0.5).double(), expected, atol=1e-4)
    same, zero = trce.directions(safe, safe, uncond, 4.0)
    assert torch.allclose(trce.hinge(uncond, same, zero, 0.5), torch.full((3,), 0.5).double(), atol=1e-6)


def test_at_the_start_the_longer_guidance_decides():
    text, safe, uncond = predictions()
    d, k = trce.directions(text, safe, uncond, 4.0)
    inner = trce.hinge(uncond, d, k + 1e4, 0.0) - 1e4
    expected = 16.0 * ((safe - uncond).square() - (text - uncond).square()).mean((1, 2, 3))
    assert torch.allclose(inner.double(), expected, rtol=1e-2, atol=2e-2)


# Stage 2


def test_trained_parameters_are_those_of_the_paper(model):
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    names = unet_parameters(unet, "visual")
    assert sum(unet.get_parameter(name).numel() for name in names) == 61_964_480
    before = {name: p.clone() for name, p in model.unet.named_parameters()}
    _, edit = fitted(model, replace(SHORT, stages="trajectory"))
    assert set(edit.tensors) == {f"unet.{name}" for name in unet_parameters(model.unet, "visual")}
    for name, parameter in model.unet.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and parameter.requires_grad


def test_nothing_is_to_keep_at_the_start_and_weight_scales_it(shared_model):
    seen, _ = fitted(shared_model)
    assert seen[0]["step"] == -1 and seen[1]["keep"] < 1e-10 < 1e-6 < seen[4]["keep"]
    original, _ = fitted(shared_model, replace(SHORT, reference="original"))
    assert original[1]["keep"] > 1e-8  # stage 1 has moved the empty prompt as well
    for state in seen[1:]:
        assert state["loss"] == pytest.approx(state["erase"] + SHORT.weight * state["keep"], rel=1e-5)


def test_what_is_held_fast_is_computed_once(shared_model, tmp_path, monkeypatch):
    """Kept with the unconditional ways, and what the merged first stage predicts there."""
    ways = []
    monkeypatch.setattr(trce, "States", lambda *args, **kw: ways.append(States(*args, **kw)) or ways[-1])
    _, edit = fitted(shared_model, folder=tmp_path)
    (calm,) = ways
    start = edit.first_stage().merged(shared_model)
    found = trce.calmed(start, calm, [], tmp_path)
    for node in range(SHORT.sampler):
        x, t = (calm.table[name][:, node] for name in ("sample", "timestep"))
        text = start.encode("").expand(SHORT.calm, -1, -1)
        with torch.no_grad():
            wanted = start.unet(x, t, encoder_hidden_states=text).sample
        assert torch.allclose(found[:, node], wanted, atol=1e-5)
        moved = found[:, node] - calm.table["uncond"][:, node]
        assert moved.abs().max() > 1e-3  # by stage 1


@pytest.mark.parametrize("family, kept", [("sdxl", 2), ("sd1", 1)])
def test_what_is_held_fast_follows_the_ways_that_guidance_leads(family, kept, tmp_path):
    """Of SDXL, whose empty prompt is no zeros; the control, SD 1, whose unconditional ways no guidance changes."""
    model = models.load(miniatures.pipeline(family))
    for guidance in (3.0, 9.0):
        config = replace(SHORT, sampler=4, early=1, noises=1, iterations=1, guidance=guidance)
        seen, _ = fitted(model, config, folder=tmp_path)
        assert [one["keep"] for one in seen if "keep" in one][0] < 1e-9
    assert len([*(tmp_path / "calm").iterdir()]) == kept


def test_training_pushes_towards_the_safe_direction(shared_model, given):
    config = replace(SHORT, stages="trajectory", iterations=60, weight=0.0, lr=3e-3, branches="text", batch=4)
    malicious, safe = [one[0] for one in given], [one[2] for one in given]
    points = trce.trajectories(shared_model, malicious, safe, 77, config)
    text = shared_model.encode(malicious)[points.prompts]

    def error():
        with torch.no_grad():
            out = shared_model.unet(
                points.latents.float(), points.timesteps, encoder_hidden_states=text
            ).sample
        return float(trce.hinge(out, points.directions, points.offsets, config.margin).mean())

    before = error()
    # and not without learning, however long
    for rate, iterations, low, high in ((config.lr, config.iterations, 0.0, 0.8), (1e-6, 3, 0.99, 1.01)):
        _, edit = fitted(shared_model, replace(config, lr=rate, iterations=iterations))
        with edit.applied(shared_model):
            assert low * before <= error() <= high * before


def test_the_codes_gradients_add_up(shared_model):
    """Three steps of AdamW on one constant gradient each, cleared and not."""
    moved = {}
    for clear in (True, False):
        module = torch.nn.Module()
        module.x = torch.nn.Parameter(torch.zeros(3))
        slopes = torch.tensor([[1.0, -1, 0], [-3, 1, 0], [1, 1, 0]])
        config = replace(SHORT, iterations=3, lr=0.1)
        tuning.descend(
            "toy", shared_model, module, lambda step, g, m=module, s=slopes: {"loss": m.x @ s[step]}, config, [],
            torch.Generator(), None, None, False, clear=clear,
        )  # fmt: skip
        literal = torch.nn.Parameter(torch.zeros(3))
        adam = torch.optim.AdamW([literal], lr=0.1, weight_decay=0.0)
        for step in range(3):
            literal.grad = slopes[step].clone() if clear else slopes[: step + 1].sum(0)
            adam.step()
        assert torch.allclose(module.x, literal, atol=1e-6)
        moved[clear] = module.x.detach().clone()
    assert not torch.allclose(moved[True], moved[False], atol=1e-2)


def test_two_stages_in_one_edit(model, tmp_path):
    _, edit = fitted(model, replace(SHORT, lr=1e-2))
    edit.save(tmp_path / "trce.safetensors")
    edit = ek.Edit.load(tmp_path / "trce.safetensors")
    assert edit.kind == "weight_delta" and "rank" in edit.summary() and "tensors" in edit.summary()
    draw = lambda m: m.generate("a church", seeds=[1], steps=3)[0].tobytes()
    plain = draw(model)
    with edit.first_stage().applied(model):
        first = draw(model)
    with edit.applied(model):
        both = draw(model)
    assert len({plain, first, both}) == 3 and draw(model) == plain
    assert draw(edit.merged(model)) == both
    _, text = fitted(model, replace(SHORT, stages="text"))
    assert all(torch.equal(text.tensors[n], edit.first_stage().tensors[n]) for n in ("left", "right"))
    with pytest.raises(ValueError, match="do not compose"):
        edit.compose(edit)
    with pytest.raises(ValueError, match="not one map"):
        fitted(model, replace(SHORT, stages="trajectory"))[1].first_stage()


def test_an_interrupted_training_goes_on_with_its_gradients(shared_model, monkeypatch):
    monkeypatch.setattr("erasekit.tuning.SAVE_EVERY", 2)
    config = replace(SHORT, stages="trajectory", iterations=6, faithful=True)
    whole, edit = fitted(shared_model, config)

    class Killed(Exception):
        pass

    def stop(state):
        if state["step"] == 4:
            raise Killed

    with pytest.raises(Killed):
        trce.fit(
            shared_model, CHURCH, config=config, generator=torch.Generator().manual_seed(0), callback=stop
        )
    rest, resumed = fitted(shared_model, config)
    assert [s["loss"] for s in rest] == [s["loss"] for s in whole[4:]] and resumed.digest == edit.digest


def test_same_seed_same_edit(shared_model):
    one, again, other = (fitted(shared_model, SHORT, seed)[1].digest for seed in (0, 0, 1))
    assert one == again != other


# Phrases and settings


def test_phrases_hold_nothing_that_was_held_out():
    held = {h.text.lower() for h in data.heldout()} | {s.lower() for c in data.concepts() for s in c.implicit}
    with trce.PHRASES.open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert not held & {row["phrase"].lower() for row in listed}
    armed = {c.name for c in data.concepts() if c.weapon}
    assert armed <= {row["concept"] for row in listed}
    harmless = {c.name for c in data.concepts() if not c.weapon}
    assert {row["safe"] for row in listed if row["concept"] in armed} <= harmless
    assert len({(row["concept"], row["phrase"]) for row in listed}) == len(listed)


def test_a_concept_without_phrases_uses_its_name_and_synonyms():
    found = trce.phrases(Concept("cello", synonyms=("bass",)), None, SHORT)
    assert found == [("cello", " "), ("bass", " ")]
    assert trce.phrases(Concept("knife"), None, SHORT)[0] == ("knife", "cutlery")
    assert trce.phrases(Concept("Knife"), None, SHORT) == trce.phrases(Concept("knife"), None, SHORT)
    assert trce.phrases(Concept("Cello"), None, SHORT) == [("Cello", " ")]
    assert trce.phrases(Concept("knife"), "spoon", SHORT)[0] == ("knife", "spoon")
    assert trce.phrases(Concept("knife", anchor="cake"), None, SHORT)[0] == ("knife", "cake")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": "two"}, "stages must be one of"),
        ({"tokens": ()}, "tokens must be some of"),
        ({"tokens": ("pad",)}, "tokens must be some of"),
        ({"early": 9}, "early must be at most sampler"),
        ({"guidance": 1.0}, "guidance above 1"),
        ({"reference": "stage2"}, "reference must be one of"),
        ({"eta": -1.0}, "eta must be at least 0"),
        ({"templates": ()}, "at least one template"),
        ({"templates": ("gun",)}, "exactly one"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_bad_calls(shared_model):
    with pytest.raises(ValueError, match="nothing to erase"):
        trce.fit(shared_model, [], config=SHORT)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fitted(shared_model, replace(SHORT, stages="trajectory", lr=1e30))


def test_defaults_are_those_of_the_code():
    default = trce.Config()
    assert (default.tokens, default.lam, default.margin, default.weight, default.beta) == (
        ("eot",),
        0.0,
        0.01,
        100.0,
        16.0,
    )
    assert (default.lr, default.iterations, default.batch, default.keep_batch) == (1e-6, 300, 1, 4)
    assert (default.eta, trce.PRESETS["sd14-unsafe"].eta) == (
        1e-4,
        4e-4,
    )  # s^2 / 3e4 of a sum over 30,000 captions, n = 1
    assert len(trce.TEMPLATES) == 15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    model = models.load(tiny_pipeline(), device="cuda", dtype="float16")
    seen, edit = fitted(model)
    assert all(state["loss"] == state["loss"] for state in seen[1:])
    with edit.applied(model):
        model.generate("a church", steps=2)
