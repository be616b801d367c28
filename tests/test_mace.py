"""MACE: the words beside the concept, attention suppression, time steps, and the fusion of many LoRAs."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from conftest import literal_erase, tiny_pipeline

from erasekit import closed_form, models, states
from erasekit.concepts import Concept, content_ids, token_ids
from erasekit.layers import attention_with_gradient, cross_attention_kv, record_attention
from erasekit.methods import mace

SHORT = mace.Config(
    anchor="house", templates=("{}", "a {}", "a {} in ink style"), keep_templates=("a {}",), lambda_1=1e-2,
    lambda_2=1e-2, lr=1e-2, iterations=4, batch=2, pictures=3, sampler=4, guidance=3.0,
)  # fmt: skip
KEEP = ["dog", "castle"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.states.FOLDER", tmp_path)


def fitted(model, config=SHORT, seed=0, erase="church", **more):
    seen = []
    generator = torch.Generator().manual_seed(seed)
    edit = mace.fit(model, erase, KEEP, config=config, generator=generator, callback=seen.append, **more)
    return seen, edit


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The words beside


@pytest.mark.parametrize(
    "prompt, other",
    [
        ("a church in ink style", "a house in ink style"),
        ("a zebra in ink style", "a house in ink style"),  # several pieces against one
        ("church", "zebra"),
        ("a church in ink style", "a  in ink style"),  # blank
        ("a church", "a church"),
    ],
)
def test_shared_words_are_paired_and_the_phrase_is_not_among_them(shared_model, prompt, other):
    tokenizer = shared_model.tokenizer
    one, two = mace.beside(tokenizer, prompt, other)
    a, b = (token_ids(tokenizer, [text])[0] for text in (prompt, other))
    assert len(one) == len(two) and torch.equal(a[one], b[two])
    assert one == sorted(set(one)) and two == sorted(set(two)) and 0 in one
    assert (
        max(one) < tokenizer.model_max_length and max(len(a) - 1 - one[-1], 0) * (len(b) - 1 - two[-1]) == 0
    )
    if prompt == other:
        assert one == two == list(range(len(a)))
    else:
        concept = set(content_ids(tokenizer, prompt)) - set(content_ids(tokenizer, other))
        assert not concept & set(a[one].tolist())
        assert len(one) >= len(a) - max(len(content_ids(tokenizer, text)) for text in (prompt, other))


def test_rows_before_the_concept_cannot_know_it(shared_model):
    sources, targets = mace.residue(shared_model, [("a church in ink style", "a house in ink style")])
    assert torch.allclose(sources[:2], targets[:2], atol=1e-6)  # start and "a"
    assert not torch.allclose(sources[2:], targets[2:], atol=1e-2)


def test_refinement_is_the_literal_solution_of_every_layer(shared_model):
    pairs = [("church", "house"), ("a church", "a house"), ("a church in ink style", "a house in ink style")]
    sources, targets = mace.residue(shared_model, pairs)
    kept = shared_model.encode(["a dog", "a castle", ""]).double().flatten(0, 1)
    first = mace.refine(sources, targets, closed_form.condensed(kept), SHORT)
    for layer in cross_attention_kv(shared_model.unet).values():
        w = layer.weight.detach().double()
        literal = literal_erase(
            w, zip(sources, targets, strict=True), kept, 1 / len(sources), SHORT.lambda_1, SHORT.lam
        )
        assert (w @ first.matrix() - literal).norm() < 1e-6 * literal.norm()


# Time steps


def test_time_steps_gather_where_it_is_decided():
    p = mace.focal()
    assert p.sum() == pytest.approx(1) and int(p.argmax()) == 300
    assert float(p[200:401].sum()) == pytest.approx(0.864, abs=2e-3)
    k = torch.arange(1, 290)
    assert torch.allclose(p[300 + k], p[300 - k], atol=1e-9)


# Attention


def test_recorded_attention_has_a_gradient_and_sums_to_one(shared_model):
    text = shared_model.encode(["a church", "a dog"]).requires_grad_(True)
    x = torch.ones(2, 4, 8, 8)
    with attention_with_gradient(shared_model.unet) as maps:
        out = shared_model.unet(x, 300, encoder_hidden_states=text).sample
    assert all(torch.allclose(m.sum(-1), torch.ones(()), atol=1e-5) for m in maps.values())
    (gradient,) = torch.autograd.grad(sum(m[..., 2].sum() for m in maps.values()), text)
    assert gradient.abs().sum() > 0
    with torch.no_grad(), record_attention(shared_model.unet) as recorded:
        assert torch.allclose(shared_model.unet(x, 300, encoder_hidden_states=text).sample, out, atol=1e-5)
    for name, seen in maps.items():
        assert torch.allclose(recorded.layers[name], seen.mean(1), atol=1e-5)


def maps_of(seed=0):
    return [random(2, 2, side * side, 6, seed=seed + side).softmax(-1) for side in (8, 4)]


def test_the_loss_is_about_marked_columns_inside_the_mask():
    maps, masks, marked = maps_of(), torch.zeros(2, 8, 8).double(), torch.zeros(2, 6, dtype=bool)
    masks[:, :4], marked[:, 2:4] = 1, True
    loss = lambda *given, **how: float(mace.attention_loss(*given, **how))
    found = loss(maps, masks, marked)
    by_hand = sum(
        float(m.unflatten(2, (s, s))[:, :, : s // 2, :, 2:4].square().mean())
        for m, s in zip(maps, (8, 4), strict=True)
    )
    assert found == pytest.approx(by_hand, rel=1e-5)
    plain = sum(
        float(m.unflatten(2, (s, s))[:, :, : s // 2, :, 2:4].square().sum().sqrt())
        for m, s in zip(maps, (8, 4), strict=True)
    )
    assert loss(maps, masks, marked, squared=False) == pytest.approx(plain, rel=1e-5)
    assert loss(maps, masks, torch.zeros(2, 6, dtype=bool)) == 0 == loss(maps, 0 * masks, marked)
    outside = [m.clone() for m in maps]
    for m, s in zip(outside, (8, 4), strict=True):
        m.unflatten(2, (s, s))[:, :, s // 2 :] += 5
        m[..., :2] += 5
    assert loss(outside, masks, marked) == pytest.approx(found)
    whole = loss(maps, torch.ones(2, 8, 8).double(), marked)
    assert whole == pytest.approx(sum(float(m[..., 2:4].square().mean()) for m in maps), rel=1e-5)


def test_columns_are_the_phrase_and_the_end_tokens(shared_model):
    tokenizer = shared_model.tokenizer
    for template in ("a {} in ink style", "{}", "zebra with a {}"):  # of two the one in the slot
        pieces, prompt = len(content_ids(tokenizer, "zebra")), template.replace("{}", "zebra")
        chosen = mace.columns(tokenizer, template, "zebra", ends=False)
        with_ends = mace.columns(tokenizer, template, "zebra", ends=True)
        end = len(content_ids(tokenizer, prompt)) + 1
        assert int(chosen.nonzero()[0]) == 1 + len(content_ids(tokenizer, template.partition("{}")[0]))
        assert int(chosen.sum()) == pieces
        assert int((with_ends & ~chosen).sum()) == tokenizer.model_max_length - end


def test_masks_from_the_models_own_attention_or_from_outside(shared_model):
    own = mace.shown(shared_model, Concept("church"), SHORT, 5)
    assert own.latents.shape == (3, 4, 8, 8) and own.masks.shape == (3, 8, 8)
    assert set(own.masks.unique().tolist()) <= {0.0, 1.0} and (own.masks.flatten(1).sum(1) > 0).all()
    everything = mace.shown(shared_model, Concept("church"), replace(SHORT, mask=0.0), 5)
    assert everything.masks.all() and torch.equal(everything.latents, own.latents)
    given = torch.zeros(3, 16, 16)
    given[:, :8] = 1
    asked = []

    def segment(pictures, name):
        asked.append((len(pictures), pictures[0].size, name))
        return given

    outside = mace.shown(shared_model, Concept("church"), SHORT, 5, segment)
    size = shared_model.decode(own.latents[:1])[0].size
    assert outside.masks[:, :4].all() and not outside.masks[:, 4:].any() and asked == [(3, size, "church")]
    given.zero_()
    given[:, 6:8, 6:8] = given[:, 0, 0] = 1  # a whole pixel of the latents, and a quarter of one
    given[1, 6:8, 6:8] = 0  # there the quarter is all that was found
    small = mace.shown(shared_model, Concept("church"), SHORT, 5, segment).masks
    assert [one.nonzero().tolist() for one in small] == [[[3, 3]], [[0, 0]], [[3, 3]]]
    given[1] = 0
    assert (
        mace.shown(shared_model, Concept("church"), SHORT, 5, segment).masks[1].all()
    )  # nothing found: everything
    with pytest.raises(ValueError, match="should give 3 masks"):
        mace.shown(shared_model, Concept("church"), SHORT, 5, lambda pictures, name: given[:2])
    styled = Concept("church", templates=("a {}",))
    whole = fitted(shared_model, erase=styled)[1]
    everywhere = lambda pictures, name: torch.ones(3, 8, 8)
    assert whole.digest == fitted(shared_model, erase=styled, segment=everywhere)[1].digest
    assert whole.digest != fitted(shared_model, erase=styled, segment=segment)[1].digest


def test_an_empty_choice_can_be_trained():
    maps = [m.requires_grad_(True) for m in maps_of()]
    mace.attention_loss(maps, torch.zeros(2, 8, 8).double(), torch.ones(2, 6, dtype=torch.bool)).backward()
    assert all(not m.grad.any() for m in maps)


def test_an_interrupted_call_goes_on_with_the_concept_it_was_at(shared_model, monkeypatch):
    monkeypatch.setattr("erasekit.tuning.SAVE_EVERY", 2)
    whole, edit = fitted(shared_model, erase=["church", "art"])

    class Killed(Exception):
        pass

    def stop(state):
        if state.get("concept") == "art" and state["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        mace.fit(
            shared_model,
            ["church", "art"],
            KEEP,
            config=SHORT,
            generator=torch.Generator().manual_seed(0),
            callback=stop,
        )
    rest, resumed = fitted(shared_model, erase=["church", "art"])
    assert [(s["concept"], s["step"]) for s in rest[1:]] == [("art", 2), ("art", 3)]
    assert resumed.digest == edit.digest
    assert not list(states.FOLDER.glob("mace-*"))


def test_a_fresh_adapter_does_nothing_and_training_lowers_the_attention(shared_model):
    generator = torch.Generator().manual_seed(0)
    unet = mace.adapter(shared_model, 1, generator)
    x, text = torch.ones(1, 4, 8, 8), shared_model.encode("a church")
    with torch.no_grad():
        torch.testing.assert_close(  # to rounding: the copy's kernels lie channels last
            unet(x, 300, encoder_hidden_states=text).sample,
            shared_model.unet(x, 300, encoder_hidden_states=text).sample,
        )
    trained = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert trained and all("attn2.to_k.lora" in name or "attn2.to_v.lora" in name for name in trained)
    assert not any(change.any() for change in mace.products(unet).values())

    pictures = mace.shown(shared_model, Concept("church"), SHORT, 5)
    seen = []
    longer = replace(SHORT, iterations=60, lr=3e-2)
    change, place = mace.suppress(shared_model, Concept("church"), pictures, longer, generator, seen.append)
    mean = lambda part: sum(state["loss"] for state in part) / len(part)
    assert mean(seen[-10:]) < 0.8 * mean(seen[:10])
    assert set(change) == set(cross_attention_kv(shared_model.unet))
    assert place.is_dir()  # left until all concepts are done
    assert all(torch.linalg.matrix_rank(one, rtol=1e-4) <= 1 for one in change.values())


# Fusion


def setting(n=2, d=6):
    weights = {"one": random(4, d, seed=1), "two": random(3, d, seed=2)}
    changes = [{name: random(*w.shape, seed=9 + i) for name, w in weights.items()} for i in range(n)]
    first = closed_form.solve(random(2, d, seed=4), random(2, d, seed=5))
    return weights, changes, first


def test_one_lora_with_enough_keys_is_merged():
    weights, changes, first = setting(1)
    config = replace(SHORT, lam=1e-12, lambda_2=0.0)
    fused = mace.fuse(weights, first, changes, [random(20, 6, seed=3)], None, config)
    for name, w in weights.items():
        assert torch.allclose(w + fused[name], first.apply_to_weight(w) + changes[0][name], atol=1e-8)


def test_nothing_to_fuse_keeps_the_refined_weights():
    weights, changes, first = setting(1)
    none = [{name: 0 * change for name, change in changes[0].items()}]
    fused = mace.fuse(weights, first, none, [random(20, 6, seed=3)], None, SHORT)
    for name, w in weights.items():
        assert torch.allclose(w + fused[name], first.apply_to_weight(w), atol=1e-10)
    pulled = mace.fuse(
        weights, first, none, [random(20, 6, seed=3)], random(9, 6, seed=8), replace(SHORT, lambda_2=1e9)
    )
    for name in weights:
        assert torch.allclose(
            pulled[name], torch.zeros(()).double(), atol=1e-5
        )  # preserved rows undo the refinement


def test_loras_with_keys_apart_are_each_exact_on_their_own():
    weights, changes, first = setting(2)
    basis = torch.linalg.qr(random(6, 6, seed=7))[0]
    keys = [random(9, 3, seed=5) @ basis[:3], random(9, 3, seed=6) @ basis[3:]]
    config = replace(SHORT, lam=1e-12, lambda_2=0.0)
    fused = mace.fuse(weights, first, changes, keys, None, config)
    for name, w in weights.items():
        for change, rows in zip(changes, keys, strict=True):
            wanted = (first.apply_to_weight(w) + change[name]) @ rows.T
            assert torch.allclose((w + fused[name]) @ rows.T, wanted, atol=1e-7)


def test_the_fusion_is_a_minimum_in_any_order():
    weights, changes, first = setting(3)
    keys, kept = [random(8, 6, seed=20 + i) for i in range(3)], random(7, 6, seed=30)
    fused = mace.fuse(weights, first, changes, keys, kept, SHORT)
    turned = mace.fuse(weights, first, changes[::-1], keys[::-1], kept, SHORT)
    for name, w in weights.items():
        assert torch.allclose(fused[name], turned[name], atol=1e-10)
        refined = first.apply_to_weight(w)

        def objective(new, name=name, w=w, refined=refined):
            of = lambda change, rows: ((new - refined - change[name]) @ rows.T).square().sum() / len(rows)
            erased = sum(of(change, rows) for change, rows in zip(changes, keys, strict=True))
            rest = SHORT.lambda_2 * ((new - w) @ kept.T).square().sum()
            return erased + rest + SHORT.lam * (new - refined).square().sum()

        best = (w + fused[name]).requires_grad_(True)
        objective(best).backward()
        assert best.grad.norm() < 1e-8 * objective(w).sqrt()


# All of it


def test_the_edit_changes_keys_and_values_alone(model, tmp_path):
    before = {name: p.clone() for name, p in model.unet.named_parameters()}
    seen, edit = fitted(model)
    assert edit.kind == "weight_delta"
    assert set(edit.tensors) == {f"unet.{name}" for name in cross_attention_kv(model.unet)}
    assert seen[0]["step"] == -1 and [s["concept"] for s in seen[1:]] == ["church"] * 4
    for name, parameter in model.unet.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert edit.to_lora(tmp_path, model=model).exists()
    draw = lambda: model.generate("a church", seeds=[1], steps=3)[0].tobytes()
    plain = draw()
    _, refined = fitted(model, replace(SHORT, lora=False))
    with refined.applied(model):
        first = draw()
    with edit.applied(model):
        assert draw() not in (plain, first)
    assert draw() == plain


def test_refinement_alone_is_a_map(model):
    _, edit = fitted(model, replace(SHORT, lora=False))
    _, whole = fitted(model)
    assert edit.kind == "context_map" and edit.nbytes < whole.nbytes


def test_several_concepts_and_same_seed(shared_model):
    seen, edit = fitted(shared_model, erase=["church", "art"])
    assert [state["concept"] for state in seen[1:]] == ["church"] * 4 + ["art"] * 4
    assert fitted(shared_model, erase=["church", "art"])[1].digest == edit.digest
    assert fitted(shared_model, seed=1, erase=["church", "art"])[1].digest != edit.digest


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mask": 1.0}, "below 1"),
        ({"guidance": 1.0}, "guidance above 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"templates": ()}, "at least one template"),
        ({"lambda_1": -1.0}, "lambda_1 must be at least 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_nothing_to_erase(shared_model):
    with pytest.raises(ValueError, match="nothing to erase"):
        mace.fit(shared_model, [], config=SHORT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    model = models.load(tiny_pipeline(), device="cuda", dtype="float16")
    seen, edit = fitted(model)
    assert all(state["loss"] == state["loss"] for state in seen[1:])
    with edit.applied(model):
        model.generate("a church", steps=2)
