"""Semantic Surgery: a prompt that holds the concept loses its direction, any other stays as it is."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline

import erasekit as ek
from erasekit.filters import presence
from erasekit.filters import semantic_surgery as operated
from erasekit.methods import semantic_surgery
from erasekit.methods.semantic_surgery import Config

SETTINGS = {"beta": 0.2, "gamma": 0.1, "tau": 0.5, "pooling": "all"}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def alone(directions: torch.Tensor) -> torch.Tensor:
    """members of sets of one."""
    return torch.eye(len(directions), dtype=directions.dtype)


def picture(model, prompt, seed=0):
    return np.asarray(model.generate([prompt], seeds=[seed], steps=3)[0]).astype(int)


# The formula


@pytest.mark.parametrize("pooling", ["all", "tokens"])
def test_it_is_the_formula(pooling):
    e, (de,) = draw(6, 4, 5), draw(1, 4, 5, seed=1)
    e[::2] += de
    settings = SETTINGS | {"pooling": pooling}
    found = operated(e, de[None], torch.ones(1, 1), **settings, strength=0.7, scale=0.5)
    for one, new in zip(e, found, strict=True):
        if pooling == "all":
            cos = (one * de).sum() / (one.norm() * de.norm())
        else:
            cos = torch.stack([(x @ d) / (x.norm() * d.norm()) for x, d in zip(one, de, strict=True)]).mean()
        rho = 1 / (1 + torch.exp(-(cos - 0.2) / 0.1))
        wanted = one - 0.5 * 0.7 * rho * de if rho > 0.5 else one
        torch.testing.assert_close(new, wanted, rtol=0, atol=1e-12)
    changed = [not torch.equal(a, b) for a, b in zip(e, found, strict=True)]
    assert any(changed) and not all(changed)


def test_what_does_not_hold_the_concept_stays_to_the_bit():
    de = draw(1, 4, 5)
    e = draw(7, 4, 5, seed=1).float()
    e -= ((e * de).sum((1, 2)) / de.square().sum())[
        :, None, None
    ].float() * de.float()  # orthogonal: cosine 0
    assert torch.equal(operated(e, de, torch.ones(1, 1), **SETTINGS), e)
    near = e + 2 * de.float()  # the control
    assert not torch.equal(operated(near, de, torch.ones(1, 1), **SETTINGS), near)


def test_without_a_threshold_an_unrelated_prompt_moves_by_less_than_the_bound():
    """tau = 0: ||e' - e|| = rho ||de|| <= exp((cos - beta) / gamma) ||de||."""
    de, e = draw(1, 4, 5), draw(50, 4, 5, seed=1)
    moved = (operated(e, de, torch.ones(1, 1), **SETTINGS | {"tau": 0.0}) - e).flatten(1).norm(dim=1)
    cos = torch.cosine_similarity(e.flatten(1), de.flatten(1), dim=1)
    assert (moved <= torch.exp((cos - 0.2) / 0.1) * de.norm() + 1e-12).all() and (moved > 0).all()


def test_a_set_of_concepts_is_subtracted_once_by_the_largest_estimate():
    """Two of three are there: the direction of their set goes, not the sum of theirs; of one alone its own."""
    single = draw(3, 4, 5)
    pairs = list(combinations(range(3), 2))
    joint = draw(3, 4, 5, seed=1)
    members = torch.cat(
        [torch.eye(3), torch.tensor([[float(i in pair) for i in range(3)] for pair in pairs])]
    )
    directions = torch.cat([single, joint])
    e = torch.stack([single[0] + single[2], single[1], single.sum(0), -single.sum(0)])
    rho = presence(e, single, beta=0.2, gamma=0.1, pooling="all")
    assert (rho[0] > 0.5).tolist() == [True, False, True] and (rho[1] > 0.5).tolist() == [False, True, False]
    found = operated(e, directions, members, **SETTINGS)
    torch.testing.assert_close(found[0], e[0] - rho[0].max() * joint[pairs.index((0, 2))])
    torch.testing.assert_close(found[1], e[1] - rho[1].max() * single[1])
    assert torch.equal(found[3], e[3])
    if (rho[2] > 0.5).all():  # all three, of which the likeliest two count
        pair = tuple(sorted(rho[2].topk(2).indices.tolist()))
        torch.testing.assert_close(found[2], e[2] - rho[2].max() * joint[pairs.index(pair)])
    apart = operated(e, single, alone(single), **SETTINGS)  # one at a time: the likeliest
    torch.testing.assert_close(apart[0], e[0] - rho[0].max() * single[int(rho[0].argmax())])


# The edit


def test_the_directions_are_those_of_the_concepts_and_of_one_prompt_for_each_set(model):
    edit = semantic_surgery.fit(model, ["church", "dog", "house"], ["castle"], config=Config(template="a {}"))
    empty = model.encode("")[0]
    prompts = ["a church", "a dog", "a house", "a church, dog", "a church, house", "a dog, house"]
    for prompt, de in zip(prompts, edit.tensors["directions"], strict=True):
        torch.testing.assert_close(de, model.encode(prompt)[0] - empty)
    assert edit.tensors["members"][3].tolist() == [1, 1, 0]
    assert edit.metadata["concepts"] == {
        "erase": ["church", "dog", "house"],
        "anchor": [],
        "preserve": ["castle"],
    }
    assert (
        len(semantic_surgery.fit(model, ["church", "dog"], config=Config(together=1)).tensors["members"]) == 2
    )


def between(model, concept: str, other: str) -> Config:
    """A threshold half way from the cosine of another prompt to that of the concept's own."""
    de = model.encode(concept) - model.encode("")
    cos = torch.cosine_similarity(model.encode([concept, other, ""]).flatten(1), de.flatten(1), dim=1)
    assert cos[0] > cos[1:].max()
    return Config(beta=float(cos[0] + cos[1:].max()) / 2, gamma=float(cos[0] - cos[1:].max()) / 20)


def test_the_concept_becomes_the_empty_prompt_and_other_prompts_stay_to_the_bit(model):
    config = between(model, "church", "dog")
    prompts = ["church", "dog", ""]
    before, drawn = model.encode(prompts), [picture(model, prompt) for prompt in prompts[:2]]
    with semantic_surgery.fit(model, "church", config=config).applied(model):
        after = model.encode(prompts)
        moved = [np.abs(picture(model, p) - one).max() for p, one in zip(prompts, drawn, strict=False)]
    assert torch.equal(after[1:], before[1:])
    assert (after[0] - before[2]).norm() < 1e-3 * (before[0] - before[2]).norm()
    assert moved[0] > 5 and moved[1] == 0


def test_both_branches_are_read_by_the_text_encoder(model):
    """A negative prompt that names the concept loses it, as it does with an edit of the text encoder."""
    config = between(model, "church", "dog")
    draw = lambda negative: np.asarray(model.generate(["a dog"], steps=2, negative=negative)[0]).astype(int)
    assert np.abs(draw("church") - draw("")).max() > 2
    with semantic_surgery.fit(model, "church", config=config).applied(model):
        assert np.abs(draw("church") - draw("")).max() <= 1


def test_it_tells_what_it_did_and_knows_its_presets(model):
    states = []
    edit = semantic_surgery.fit(model, ["church", "dog"], callback=states.append)
    assert states == [{"step": 0, "concepts": 2, "sets": 3}] and edit.metadata["method"] == "semantic_surgery"
    assert edit.metadata["filter"] == {
        "formula": "semantic_surgery", "beta": -0.12, "gamma": 0.02, "tau": 0.5, "strength": 1.0, "pooling": "all",
    }  # fmt: skip
    own = semantic_surgery.PRESETS["emoji"]
    assert own == dataclasses.replace(semantic_surgery.PRESETS["sd14-object"], beta=own.beta)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"erase": "church", "preserve": ["church"]}, "both erased and preserved"),
        ({"erase": []}, "nothing to erase"),
        ({"erase": "church", "anchor": "house"}, "nothing in the place of a concept"),
        ({"erase": [f"dog {'a ' * i}b" for i in range(19)], "config": Config(together=4)}, "set together=1"),
    ],
)
def test_bad_input(model, given, said):
    with pytest.raises(ValueError, match=said):
        ek.semantic_surgery.fit(model, **given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta": -2}, "beta must be"),
        ({"gamma": 0}, "gamma must be"),
        ({"tau": -1}, "tau must be"),
        ({"together": 0}, "together must be"),
        ({"together": 1.5}, "together must be a whole number"),
        ({"pooling": "end"}, "pooling must be all or tokens"),
        ({"template": "x"}, "exactly one"),
    ],
)
def test_bad_settings(changes, said):
    with pytest.raises(ValueError, match=said):
        Config(**changes)


@pytest.mark.slow
def test_it_erases_in_the_emoji_world():
    from erasekit.evaluate.judges import JUDGES

    model, judge = ek.load("emoji"), JUDGES["emoji-object"]()
    drawn = lambda what: model.generate([f"a {what} in flat style"], seeds=range(4))
    count = lambda what, seen: sum(max(one, key=one.get) == what for one in judge.scores(seen, [what] * 4))
    before = {what: drawn(what) for what in ("guitar", "violin")}
    with ek.semantic_surgery.fit(model, "guitar").applied(model):
        after = {what: drawn(what) for what in before}
    assert count("guitar", before["guitar"]) >= 3 > 1 >= count("guitar", after["guitar"])
    assert all(np.array_equal(*pair) for pair in zip(before["violin"], after["violin"], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_an_accelerator():
    config = Config(beta=0.0, gamma=0.1)
    for dtype in (torch.float32, torch.float16):
        there = ek.load(tiny_pipeline(), device="cuda", dtype=dtype)
        edit = ek.semantic_surgery.fit(there, "church", config=config)
        here = ek.semantic_surgery.fit(ek.load(tiny_pipeline()), "church", config=config)
        torch.testing.assert_close(edit.tensors["directions"], here.tensors["directions"], rtol=0, atol=5e-2)
        plain = picture(there, "church")
        with edit.applied(there):
            assert np.abs(picture(there, "church") - plain).max() > 5
        assert np.array_equal(picture(there, "church"), plain)
