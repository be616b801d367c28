"""OCE: outputs turn and keep their length, and the turn is the best there is."""

import dataclasses
import warnings

import pytest
import torch
from conftest import check_dogs_go_and_cats_stay, tiny_pipeline
from safetensors.torch import load_file

import erasekit as ek
from erasekit.layers import cross_attention_kv
from erasekit.methods import oce
from erasekit.retained import retained

PLAIN = oce.Config(guides=("dog",), e=3e4)
KEEP = ["castle", "house"]


def given(model, erase="church", preserve=KEEP, config=PLAIN):
    return oce.rows(model, model.concepts(erase), model.concepts(preserve), None, config)


def values(model) -> dict[str, torch.Tensor]:
    return {
        name: layer.weight.detach().double()
        for name, layer in cross_attention_kv(model.unet, "values").items()
    }


def relative(difference, size) -> float:
    return float(difference.norm() / size.norm())


def matrix(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_rotation(n: int, seed: int) -> torch.Tensor:
    q, _ = torch.linalg.qr(matrix(n, seed))
    q[:, 0] *= torch.linalg.det(q).sign()
    return q


def test_it_is_a_rotation_and_turns_no_length(model):
    """Of every output, in every layer; the control is UCE, that changes lengths."""
    rows, general = given(model, ["church", "art"])
    x = matrix(32, 0)
    uce = ek.uce.fit(model, ["church", "art"], KEEP).context_map
    for w in values(model).values():
        r = oce.rotation(oce.agreement(w, rows, general, PLAIN))
        torch.testing.assert_close(r @ r.T, torch.eye(len(r)).double(), rtol=0, atol=1e-10)
        assert float(torch.linalg.det(r)) == pytest.approx(1, abs=1e-10)
        lengths = (x @ w.T).norm(dim=1)
        torch.testing.assert_close((x @ (r @ w).T).norm(dim=1), lengths, rtol=1e-12, atol=0)
        assert relative((x @ uce.apply_to_weight(w).T).norm(dim=1) - lengths, lengths) > 1e-3
        assert relative(r @ w - w, w) > 1e-2


@pytest.mark.parametrize("reflected", [False, True])
def test_no_rotation_agrees_better(reflected):
    """None at random and none nearby, also where the best orthogonal matrix is a reflection, which would do better."""
    m = matrix(6, 1)
    if (torch.linalg.det(m) < 0) != reflected:
        m[0] *= -1
    r = oce.rotation(m)
    best = torch.trace(r.T @ m)
    assert float(torch.linalg.det(r)) == pytest.approx(1, abs=1e-10)
    for seed in range(200):
        assert torch.trace(random_rotation(6, seed).T @ m) <= best
        skew = matrix(6, seed) - matrix(6, seed).T
        assert torch.trace((torch.matrix_exp(1e-3 * skew) @ r).T @ m) < best
    total = torch.linalg.svdvals(m)
    expected = total.sum() - 2 * total[-1] * reflected
    assert float(best) == pytest.approx(float(expected), rel=1e-12)


def test_what_it_agrees_with_is_the_sum_of_four_wishes(model):
    """One outer product at a time, with G and G* by QR."""
    config = dataclasses.replace(
        PLAIN, guides=("dog", "ink"), e=7.0, p=5.0, p2=3.0, lam=2.0, general_templates=("a {}",)
    )
    rows, general = given(model, ["church", "art"], config=config)
    blocks = model.encode(
        [f"a {name}" for name in retained(model, [ek.Concept("church"), ek.Concept("art")], (), ("{}",))[0]]
    )
    c_g = sum(torch.outer(x, x) for x in blocks.double().flatten(0, 1)) / blocks[..., 0].numel()
    torch.testing.assert_close(general, c_g)
    for w in values(model).values():
        outputs = lambda phrases, w=w: torch.stack(
            [w @ model.encode(one)[0, 1].double() for one in phrases], 1
        )
        project = lambda columns: (lambda q: q @ q.T)(torch.linalg.qr(columns / columns.norm(dim=0)).Q)
        g, g_star = project(outputs(["church", "art"])), project(outputs(["dog", "ink"]))
        kept = sum(torch.outer(k, k) for k in outputs(KEEP).T)
        expected = -7 * g @ (torch.eye(len(w)) - g_star) + 3 * kept + 5 * w @ c_g @ w.T + 2 * w @ w.T
        found = oce.agreement(w, rows, general, config)
        assert relative(found - expected, expected) < 1e-9


def test_a_small_weight_erases_nothing_and_a_large_one_turns_the_concept_around(model):
    """Where no guide is in the way M is symmetric and the rotation its sign, so nothing lies between but more turns."""
    w = next(iter(values(model).values()))
    rows, general = given(model)
    apart = dataclasses.replace(rows, targets=torch.zeros_like(rows.targets) + torch.linalg.svd(w).Vh[-1])
    for e, turned in ((1e-3, 0), (1e9, 1)):
        m = oce.agreement(w, apart, general, dataclasses.replace(PLAIN, e=e))
        r = oce.rotation(m)
        output = w @ rows.sources[0]
        cosine = float(torch.cosine_similarity(output, r @ output, 0))
        assert (cosine < -0.9) if turned else (relative(r - torch.eye(len(r)), r) < 1e-6)


def test_what_is_preserved_turns_less_when_it_weighs_more(model):
    w = next(iter(values(model).values()))
    rows, general = given(model)
    drift = []
    for p2 in (0.0, 1e3, 1e9):
        r = oce.rotation(oce.agreement(w, rows, general, dataclasses.replace(PLAIN, p2=p2)))
        kept = w @ rows.preserved.T
        drift.append(relative(r @ kept - kept, kept))
    assert drift[0] > drift[1] > drift[2] and drift[2] < 1e-3


def test_the_order_of_concepts_is_of_no_account(model):
    for w in values(model).values():
        one, two = (
            oce.rotation(oce.agreement(w, *given(model, erase, preserve), PLAIN)) @ w
            for erase, preserve in (
                (["church", "art"], ["castle", "house"]),
                (["art", "church"], ["house", "castle"]),
            )
        )
        assert relative(one - two, one) < 1e-8


def test_guides_are_shared_and_come_from_the_caller_the_concept_or_the_settings(model):
    own = ek.Concept("church", anchor="house")
    rows = lambda anchor, *erase: oce.rows(model, erase, (), anchor, oce.Config(guides=("dog", "ink")))[0]
    assert rows("castle", own).concepts["anchor"] == ["castle"]
    assert rows(ek.Concept("castle"), own).concepts["anchor"] == ["castle"]
    both = rows(None, own, ek.Concept("art"))
    assert both.concepts["anchor"] == ["house", "dog", "ink"] and len(both.sources) == len(both.targets) == 3
    assert torch.equal(both.sources[1], both.sources[2]) and both.preserved is None


def test_the_edit_is_that_of_the_solver_and_leaves_the_model_alone(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    same = lambda: all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())
    seen = []
    edit = oce.fit(model, "church", KEEP, config=PLAIN, callback=seen.append)
    assert edit.kind == "weight_delta" and same()
    assert [f"unet.{one['layer']}" for one in seen] == list(edit.tensors)
    assert all(-1 <= one["cosine"] < 1 and one["preserve_drift"] > 0 for one in seen)
    assert oce.fit(model, "church", KEEP, config=PLAIN).digest == edit.digest
    edit.save(tmp_path / "edit.safetensors")
    loaded = ek.Edit.load(tmp_path / "edit.safetensors")
    assert loaded.digest == edit.digest
    rows = given(model)
    with loaded.applied(model):
        for name, w in values(model).items():
            old = before[name].double()
            assert relative(oce.rotation(oce.agreement(old, *rows, PLAIN)) @ old - w, w) < 1e-6
        after = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    assert same()
    merged = edit.merged(model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in merged.unet.state_dict().items())
    written = load_file(edit.to_projections(tmp_path / "projections.safetensors", model=model))
    assert len(written) == len(seen) and all(
        torch.equal(tensor, after[name]) for name, tensor in written.items()
    )
    lora = load_file(edit.to_lora(tmp_path, model=model))
    for name in written:
        a, b = (lora[f"unet.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        assert relative(b @ a - (after[name] - before[name]), after[name] - before[name]) < 1e-5
    with pytest.raises(ValueError, match="not one map of text embeddings"):
        edit.context_map  # noqa: B018


def test_a_concept_that_is_a_guide_is_told_to_stay_as_it_is(model):
    """Its own, or another concept's, for all concepts share all guides; the control: another guide, and no word."""
    with pytest.warns(UserWarning, match="church: its own anchor"):
        still = oce.fit(model, "church", KEEP, anchor="Church", config=PLAIN)
    assert max(float(tensor.abs().max()) for tensor in still.tensors.values()) < 1e-10
    with pytest.warns(UserWarning, match="^dog: its own anchor"):
        oce.fit(model, [ek.Concept("church", anchor="dog"), ek.Concept("dog", anchor="art")], config=PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = oce.fit(model, "church", KEEP, config=PLAIN)
    assert max(float(tensor.abs().max()) for tensor in moved.tensors.values()) > 1e-3


def test_general_templates_with_an_erased_word_are_named_in_the_error(model):
    config = dataclasses.replace(PLAIN, general_templates=("a church of {}",))
    with pytest.raises(ValueError, match="give general_templates without them"):
        oce.fit(model, "church", KEEP, config=config)
    assert oce.fit(model, "art", KEEP, config=config).tensors


@pytest.mark.parametrize(
    ("erase", "preserve", "said"),
    [("church", ["church"], "both erased and preserved"), ([], (), "nothing to erase")],
)
def test_bad_input(model, erase, preserve, said):
    with pytest.raises(ValueError, match=said):
        oce.fit(model, erase, preserve, config=PLAIN)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"e": -1.0}, "e must be at least 0"),
        ({"lam": 0.0}, "lam must be above 0"),
        ({"guides": ()}, "at least one phrase"),
        ({"guides": "sky"}, "at least one phrase"),
        ({"templates": ()}, "at least one template"),
        ({"general_templates": ("a",)}, "exactly one"),
    ],
)
def test_bad_settings(changes, said):
    with pytest.raises(ValueError, match=said):
        oce.Config(**changes)


def test_another_family_is_refused(shared_model, monkeypatch):
    monkeypatch.setattr(type(shared_model), "own_loop", False)
    with pytest.raises(ValueError, match="erase by uce or rece"):
        oce.fit(shared_model, "church")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_an_accelerator():
    there, here = (
        oce.fit(ek.load(pipeline), "church", KEEP, config=PLAIN)
        for pipeline in (tiny_pipeline().to("cuda"), tiny_pipeline())
    )
    assert there.tensors.keys() == here.tensors.keys()
    for name, tensor in there.tensors.items():
        torch.testing.assert_close(tensor, here.tensors[name], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_dogs_go_and_cats_stay(tmp_path):
    check_dogs_go_and_cats_stay(oce, tmp_path)
