"""AdaVD: the part of a value that lies along the concept's goes, by how near it is; all else stays to the bit."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline

import erasekit as ek
from erasekit.concepts import last_subject_token
from erasekit.filters import adavd as filtered
from erasekit.layers import cross_attention
from erasekit.methods import adavd

WHOLE = {"a": 100.0, "b": -1.0, "c": 1.0}  # delta is 1 for every cosine above -1


def draw(count: int, *shape: int) -> torch.Tensor:
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def picture(model, prompt="church", seed=0):
    return np.asarray(model.generate([prompt], seeds=[seed], steps=3)[0]).astype(int)


# The formula


def test_it_is_the_formula_token_by_token():
    values, targets = draw(3, 5, 8), draw(1, 8)
    values[1] += 3 * targets  # some above the threshold
    found = filtered(values, targets, a=7.0, b=0.4, c=2.0, scale=0.5)
    (t,) = targets
    for prompt, row in zip(values, found, strict=True):
        assert torch.equal(row[0], prompt[0])
        for v, new in zip(prompt[1:], row[1:], strict=True):
            cos = (v @ t) / (v.norm() * t.norm())
            delta = 2.0 / (1 + torch.exp(-7.0 * (cos - 0.4)))
            torch.testing.assert_close(new, v - 0.5 * delta * (v @ t) / (t @ t) * t, rtol=0, atol=1e-12)


def test_several_targets_are_the_gram_schmidt_of_the_code_and_their_order_is_of_no_account():
    """Two: coefficients along q_1 = t_1 and q_2 = t_2 - (t_2.q_1 / ||q_1||^2) q_1, put back as coefficients of t."""
    values, (t1, t2) = draw(2, 4, 8), draw(2, 8)
    q2 = t2 - (t2 @ t1) / (t1 @ t1) * t1
    w1, w2 = values @ t1 / (t1 @ t1), values @ q2 / (q2 @ q2)
    k1, k2 = w1 - w2 * (t2 @ t1) / (t1 @ t1), w2
    delta = lambda t: 2 * torch.sigmoid(5 * (torch.cosine_similarity(values, t, dim=-1) - 0.1))
    wanted = values - (delta(t1) * k1)[..., None] * t1 - (delta(t2) * k2)[..., None] * t2
    wanted[:, 0] = values[:, 0]
    for targets in (torch.stack([t1, t2]), torch.stack([t2, t1])):
        found = filtered(values, targets, a=5.0, b=0.1, c=2.0)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_with_delta_one_the_span_of_the_targets_goes_and_what_is_orthogonal_stays():
    targets = draw(3, 8)
    inside = draw(1, 4, 3) @ targets
    _, _, directions = torch.linalg.svd(targets)
    outside = draw(2, 4, 5) @ directions[3:]
    gone = filtered(inside, targets, a=1e4, b=-2.0, c=1.0)
    assert torch.equal(gone[:, 0], inside[:, 0]) and gone[:, 1:].abs().max() < 1e-9
    stays = filtered(outside, targets, a=1e4, b=-2.0, c=1.0)
    assert (stays - outside).abs().max() < 1e-9 < outside.abs().max()
    twice = filtered(stays, targets, a=1e4, b=-2.0, c=1.0)
    torch.testing.assert_close(twice, stays, rtol=0, atol=1e-12)


def test_a_token_that_is_the_target_is_mirrored_by_the_published_settings():
    (t,) = draw(1, 8)
    mirrored = filtered(t.expand(1, 3, 8), t[None], a=100.0, b=0.93, c=2.0)
    torch.testing.assert_close(mirrored[0, 1:], -t.expand(2, 8), rtol=0, atol=0.01 * float(t.norm()))


def test_values_of_nothing_stay_nothing():
    zeros = torch.zeros(1, 3, 8)
    assert torch.equal(filtered(zeros, torch.ones(1, 8), a=100.0, b=-1.0, c=2.0), zeros)
    values = draw(1, 3, 8)
    assert torch.equal(filtered(values, torch.zeros(1, 8), a=100.0, b=-1.0, c=2.0), values)


# The edit


def test_a_threshold_that_is_never_reached_leaves_every_picture_to_the_bit(model):
    plain = picture(model)
    for b, changes in ((3.0, False), (0.5, True)):  # no cosine is 3; the control
        with adavd.fit(model, "church", config=adavd.Config(b=b)).applied(model):
            assert np.array_equal(picture(model), plain) != changes


def test_the_values_of_every_layer_are_filtered_by_what_the_layer_makes_of_the_concept(model):
    prompt, seen = "a church in flat style", {}
    config = adavd.Config(b=0.5, template="a {}")
    edit = adavd.fit(model, "church", config=config)
    at = last_subject_token(model.tokenizer, "a church", "church")
    row = model.encode("a church")[0, at]
    assert at == 2 and torch.equal(edit.tensors["concepts"], row[None])
    text = model.encode(prompt)
    with edit.applied(model), torch.no_grad():
        for name, one in cross_attention(model.unet).items():
            seen[name] = one.to_v(text)
            w = one.to_v.weight
            wanted = filtered((text @ w.T).double(), (row @ w.T)[None].double(), a=100.0, b=0.5, c=2.0)
            torch.testing.assert_close(seen[name].double(), wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(seen[name][:, 0], (text @ w.T)[:, 0])
    assert len(seen) > 1


def test_the_target_follows_an_edit_of_the_weights(model):
    """t is what the edited layer makes of the concept: the part along it goes all the same."""
    edit = adavd.fit(model, "church", config=adavd.Config(**WHOLE))
    layer = next(iter(cross_attention(model.unet).values())).to_v
    church = model.encode("church")
    weight = ek.Edit.from_weight_delta(
        {
            f"unet.{name}": torch.randn_like(p)
            for name, p in model.unet.named_parameters()
            if p is layer.weight
        },
        model,
    )
    with weight.applied(model), edit.applied(model), torch.no_grad():
        assert layer(church)[0, 1].abs().max() < 1e-4 < (church @ layer.weight.T)[0, 1].abs().max()


def test_the_picture_of_the_concept_moves_and_that_of_another_prompt_little(model):
    """ "dog" is far from "church" for the tiny text encoder; the start token and the padding are all they share."""
    plain = {prompt: picture(model, prompt) for prompt in ("church", "dog")}
    with adavd.fit(model, "church", config=adavd.Config(b=0.97)).applied(model):
        moved = {prompt: np.abs(picture(model, prompt) - one).mean() for prompt, one in plain.items()}
    assert moved["church"] > 1 and moved["church"] > 3 * moved["dog"]


def test_several_concepts_in_any_order_are_one_edit(model):
    drawn = []
    for order in (["church", "dog"], ["dog", "church"]):
        edit = adavd.fit(model, order, ["house"], config=adavd.Config(b=0.5))
        with edit.applied(model):
            drawn.append(picture(model, "a church"))
    assert edit.tensors["concepts"].shape[0] == 2 and edit.metadata["concepts"]["preserve"] == ["house"]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_it_tells_what_it_did_and_knows_its_presets(model):
    states = []
    edit = adavd.fit(model, "church", callback=states.append)
    assert states == [{"step": 0, "concepts": 1}] and edit.metadata["method"] == "adavd"
    assert edit.metadata["filter"] == {"formula": "adavd", "a": 100.0, "b": 0.93, "c": 2.0}
    assert adavd.PRESETS["emoji"] == dataclasses.replace(
        adavd.PRESETS["sd14-object"], b=adavd.PRESETS["emoji"].b
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"erase": "church", "preserve": ["church"]}, "both erased and preserved"),
        ({"erase": []}, "nothing to erase"),
        ({"erase": "church", "anchor": "house"}, "nothing in the place of a concept"),
        ({"erase": ek.Concept("church", templates=("{}", "a {}"))}, "one template"),
    ],
)
def test_bad_input(model, given, said):
    with pytest.raises(ValueError, match=said):
        ek.adavd.fit(model, **given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"a": -1}, "a must be"),
        ({"b": -2}, "b must be"),
        ({"c": -1}, "c must"),
        ({"template": "x"}, "exactly one"),
    ],
)
def test_bad_settings(changes, said):
    with pytest.raises(ValueError, match=said):
        adavd.Config(**changes)


@pytest.mark.slow
def test_it_erases_in_the_emoji_world():
    from erasekit.evaluate.judges import JUDGES

    model, judge = ek.load("emoji"), JUDGES["emoji-object"]()
    count = lambda what: sum(
        max(one, key=one.get) == what
        for one in judge.scores(model.generate([f"a {what} in flat style"], seeds=range(4)), [what] * 4)
    )
    before = {what: count(what) for what in ("guitar", "violin")}
    with ek.adavd.fit(model, "guitar").applied(model):
        after = {what: count(what) for what in before}
    assert before["guitar"] >= 3 > 1 >= after["guitar"] and after["violin"] >= before["violin"] - 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_an_accelerator():
    for dtype in (torch.float32, torch.float16):
        there = ek.load(tiny_pipeline(), device="cuda", dtype=dtype)
        edit = ek.adavd.fit(there, "church", config=adavd.Config(b=0.5))
        here = ek.adavd.fit(ek.load(tiny_pipeline()), "church", config=adavd.Config(b=0.5))
        torch.testing.assert_close(edit.tensors["concepts"], here.tensors["concepts"], rtol=0, atol=2e-2)
        plain = picture(there)
        with edit.applied(there):
            assert np.abs(picture(there) - plain).max() > 5
        assert np.array_equal(picture(there), plain)


@pytest.mark.slow
def test_a_style_of_the_world_is_taken_in_its_first_template():
    model = ek.load("emoji")
    (ink,) = model.concepts("ink")
    assert len(ink.templates) > 1
    first = dataclasses.replace(ink, templates=ink.templates[:1])
    edits = [adavd.fit(model, asked) for asked in ("ink", first)]
    assert torch.equal(*(edit.tensors["concepts"] for edit in edits))
    with pytest.raises(ValueError, match="one template"):  # a choice of one's own is not cut short
        adavd.fit(model, ink)
