"""SPEED: what is retained does not move, and each of its three parts does what its name says."""

import dataclasses

import pytest
import torch
from conftest import LENGTH, WIDTH, check_dogs_go_and_cats_stay, tiny_pipeline
from safetensors.torch import load_file

import erasekit as ek
from erasekit.closed_form import output_residuals
from erasekit.layers import cross_attention_kv
from erasekit.methods import dp, speed

PLAIN = speed.Config(ipf=False, dpa=False, iec=False, cut=1e-12)
KEEP = ["castle", "house"]


def given(model, erase="church", preserve=KEEP, config=PLAIN):
    return speed.rows(model, model.concepts(erase), model.concepts(preserve), None, config)


def solved(model, rows, weight, config=PLAIN, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return speed.solve(rows, speed.constraints(model, config), weight, config, generator)


def values(model) -> dict[str, torch.Tensor]:
    return {
        name: layer.weight.detach().double()
        for name, layer in cross_attention_kv(model.unet, "values").items()
    }


def relative(difference, size) -> float:
    return float(difference.norm() / size.norm())


def literal(weight, rows, fixed, config):
    """W + Delta P as the paper writes it, rows as columns, inverses and all."""
    c, c_star, c0, eye = rows.sources.T, rows.targets.T, rows.preserved.T, torch.eye(WIDTH).double()
    u, s, _ = torch.linalg.svd(c0 @ c0.T / c0.shape[1])
    u0 = u[:, s < config.cut]
    p = u0 @ u0.T
    m = torch.linalg.inv(c @ c.T @ p + config.retain_scale * eye)
    q = eye
    if fixed is not None:
        c2 = fixed.T
        q = eye - m @ c2 @ torch.linalg.inv(c2.T @ p @ m @ c2) @ c2.T @ p
    return weight + weight @ (c_star @ c.T - c @ c.T) @ p @ q @ m


def test_retained_rows_do_not_move(model):
    """To 1e-9, through every layer and with several concepts; the control is UCE, which moves them."""
    rows = given(model, ["church", "dog"])
    uce = ek.uce.fit(model, ["church", "dog"], KEEP, config=ek.uce.Config(preserve_null=False)).context_map
    for w in values(model).values():
        t, told = solved(model, rows, w)
        found = output_residuals(w, t.apply_to_weight(w), rows)
        assert found["preserve_drift"] < 1e-9 and found["erase_residual"] < 0.1
        assert told == {"kept": 1.0, "null": WIDTH - len(KEEP)}
        assert output_residuals(w, uce.apply_to_weight(w), rows)["preserve_drift"] > 1e-6


@pytest.mark.parametrize("iec", [False, True])
def test_it_is_the_formula_of_the_paper_with_one_right_factor_for_all_layers(model, iec):
    """The literal formula for each weight against one map, whichever layer it was solved for."""
    config = dataclasses.replace(PLAIN, iec=iec, retain_scale=0.7, centres=2)
    rows, fixed = given(model, ["church", "dog"], config=config), speed.constraints(model, config)
    assert (fixed is None) != iec
    weights = list(values(model).values())
    t, _ = solved(model, rows, weights[-1], config)
    for w in weights:
        expected = literal(w, rows, fixed, config)
        assert relative(t.apply_to_weight(w) - expected, expected) < 1e-8
        assert relative(expected - w, w) > 1e-2


def test_dpa_gives_each_layer_a_map_of_its_own_and_ipf_where_several_rows_are_erased(model):
    """One source row moves every row by a multiple of W (c* - c), so that IPF's choice is the same for every W."""
    (first, *_, last), keep = values(model).values(), ["castle", "house", "art", "ink"]
    one, two = given(model, "church", keep), given(model, ["church", "dog"], keep)
    move = two.targets - two.sources
    blind = [torch.outer(x, x) / x.square().sum() for x in move]  # each sees where one of the two goes
    for part, rows, weights, same in (
        ("iec", two, blind, True),
        ("ipf", one, blind, True),
        ("ipf", two, blind, False),
        ("dpa", one, (first, last), False),
    ):
        config = dataclasses.replace(PLAIN, **{part: True})
        a, b = (solved(model, rows, w, config)[0].matrix() for w in weights)
        assert (relative(a - b, a) < 1e-12) == same, part


def test_without_its_parts_it_is_dp_with_a_ridge(model):
    """The same system; what differs is what stands in it. A ridge that is a share there is a number here."""
    rows, w = given(model), next(iter(values(model).values()))
    pi = speed.span(rows.preserved, 1e-6)
    outside = rows.sources - rows.sources @ pi.T @ pi
    top = float(torch.linalg.eigvalsh(outside @ outside.T)[-1])
    other, _ = dp.solve(rows, dp.Config(ridge=1 / top))
    here, _ = solved(model, rows, w)
    assert relative(here.matrix() - other.matrix(), other.matrix()) < 1e-9


def test_equality_constraints_hold_and_only_with_iec(model):
    w, config = next(iter(values(model).values())), dataclasses.replace(PLAIN, iec=True)
    rows, fixed = given(model, config=config), speed.constraints(model, config)
    assert fixed.shape == (4, WIDTH)
    assert torch.equal(fixed[0], model.encode("")[0, 0].double())
    drift = lambda t: relative(t.apply(fixed) - fixed, fixed)
    t, told = solved(model, rows, w, config)
    assert drift(t) < 1e-9 < 1e-4 < drift(solved(model, rows, w)[0])
    assert told["null"] == WIDTH - len(KEEP) - 4


def test_a_constraint_that_is_retained_already_changes_nothing(model):
    """The inverse of the formula is singular there."""
    rows, w = given(model), next(iter(values(model).values()))
    again, _ = speed.solve(rows, rows.preserved[:1], w, PLAIN, None)
    assert relative(again.matrix() - solved(model, rows, w)[0].matrix(), again.matrix()) < 1e-9


def test_centres_are_those_of_k_means(shared_model):
    """Each is the mean of the rows nearest to it, and no choice of other starts does much better."""
    others = shared_model.encode("")[0, 1:].double()
    centres = speed.constraints(shared_model, speed.Config(centres=3))[1:]
    nearest = torch.cdist(others, centres).argmin(1)
    for i, centre in enumerate(centres):
        torch.testing.assert_close(centre, others[nearest == i].mean(0))
    everything = speed.constraints(shared_model, speed.Config(centres=100))
    assert len(everything) == LENGTH
    assert relative(everything[1:].sum(0) - others.sum(0), others.sum(0)) < 1e-6


def test_ipf_keeps_the_rows_above_the_mean(model):
    """The mean of what the erasure alone, written out, would do to each."""
    rows = given(model, preserve=["castle", "house", "dog", "art"])
    c, c_star, eye = rows.sources.T, rows.targets.T, torch.eye(WIDTH).double()
    for w in values(model).values():
        alone = w @ (c_star - c) @ c.T @ torch.linalg.inv(c @ c.T + eye)
        shift = (alone @ rows.preserved.T).norm(dim=0)
        kept = speed.filtered(rows, w, PLAIN)
        assert torch.equal(kept, rows.preserved[shift > shift.mean()])
        told = solved(model, rows, w, dataclasses.replace(PLAIN, ipf=True))[1]
        assert 0 < len(kept) < 4 and told["kept"] == len(kept) / 4
    single = given(model, preserve="castle")
    assert torch.equal(speed.filtered(single, w, PLAIN), single.preserved)  # not above itself, and yet kept


def test_dpa_moves_rows_where_the_layer_hardly_looks(model):
    """Along one line, the direction that W shrinks most; so in the end it closes that one direction."""
    rows = given(model)
    for w in values(model).values():
        more = speed.augmented(rows.preserved, w, 50, torch.Generator().manual_seed(0))
        assert len(more) == 2 * 51 and torch.equal(more[:2], rows.preserved)
        noise = more[2:] - rows.preserved.repeat_interleave(50, 0)
        smallest = torch.linalg.svdvals(w)[-1]
        torch.testing.assert_close((noise @ w.T).norm(dim=1), noise.norm(dim=1) * smallest)
        assert torch.linalg.matrix_rank(noise, rtol=1e-9) == 1
        assert float(noise.square().sum(1).mean()) == pytest.approx(1, abs=0.4)
        told = solved(model, rows, w, dataclasses.replace(PLAIN, dpa=True))[1]
        assert told["null"] == WIDTH - len(KEEP) - 1


def test_the_cut_is_a_singular_value_of_the_mean(model):
    """Of the mean of c c^T, as the code has it: raising it past one sets one direction free."""
    rows, w = (
        given(model, preserve=["castle", "house", "dog"], erase="church"),
        next(iter(values(model).values())),
    )
    s = torch.linalg.svdvals(rows.preserved.T @ rows.preserved / 3)[:3]
    free = [
        solved(model, rows, w, dataclasses.replace(PLAIN, cut=float(cut)))[1]["null"]
        for cut in (0.9 * s[2], 1.1 * s[2], 1.1 * s[1])
    ]
    assert free == [WIDTH - 3, WIDTH - 2, WIDTH - 1]


def test_a_token_that_has_nowhere_to_go_may_be_fixed(model):
    """With all tokens erased, as for nudity, the start token is its own target and one of the constraints."""
    config = dataclasses.replace(speed.PRESETS["sd14-nudity"], ipf=False, dpa=False)
    rows = speed.rows(model, model.concepts("church"), model.concepts(KEEP), None, config)
    fixed = speed.constraints(model, config)
    assert torch.equal(rows.sources[0], rows.targets[0])
    torch.testing.assert_close(rows.sources[0], fixed[0])
    assert speed.fit(model, "church", KEEP, config=config).kind == "weight_delta"
    moved = dataclasses.replace(
        rows, targets=rows.targets.roll(1, 0)
    )  # control: now it should move, and may not
    with pytest.raises(ValueError, match="nothing of it can be moved"):
        speed.solve(moved, fixed, next(iter(values(model).values())).double(), config, None)


def test_the_edit_is_that_of_the_solver_and_leaves_the_model_alone(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    same = lambda: all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())
    seen = []
    edit = speed.fit(model, "church", KEEP, config=PLAIN, callback=seen.append)
    assert edit.kind == "weight_delta" and same()
    assert set(edit.tensors) == {f"unet.{name}" for name in values(model)}
    assert [one["layer"] for one in seen] == list(values(model)) and seen[0]["preserve_drift"] < 1e-9
    t, _ = solved(model, given(model), next(iter(values(model).values())))
    edit.save(tmp_path / "edit.safetensors")
    loaded = ek.Edit.load(tmp_path / "edit.safetensors")
    assert loaded.digest == edit.digest
    with loaded.applied(model):
        for name, w in values(model).items():
            assert relative(w - t.apply_to_weight(before[name].double()), w) < 1e-6
        after = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    assert same()
    merged = edit.merged(model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in merged.unet.state_dict().items())
    written = load_file(edit.to_projections(tmp_path / "projections.safetensors", model=model))
    assert all(torch.equal(tensor, after[name]) for name, tensor in written.items())
    assert len(written) == len(seen)
    lora = load_file(edit.to_lora(tmp_path, model=model))
    stem = seen[0]["layer"].removesuffix(".weight")
    a, b = (lora[f"unet.{stem}.lora_{side}.weight"].double() for side in "AB")
    change = t.apply_to_weight(before[f"{stem}.weight"].double()) - before[f"{stem}.weight"].double()
    assert len(a) <= 3 and relative(b @ a - change, change) < 1e-5


def test_both_projections_without_filter_are_one_map_of_the_text(model):
    both = dataclasses.replace(PLAIN, projections="both")
    edit = speed.fit(model, "church", KEEP, config=both)
    t, _ = solved(model, given(model), next(iter(values(model).values())))
    assert edit.kind == "context_map"
    assert relative(edit.context_map.matrix() - t.matrix(), t.matrix()) < 1e-6
    for config, count in (
        (dataclasses.replace(both, ipf=True), 2),
        (dataclasses.replace(PLAIN, projections="keys"), 1),
    ):
        edit = speed.fit(model, "church", KEEP, config=config)
        assert edit.kind == "weight_delta" and len(edit.tensors) == count * len(values(model))
    assert all("to_k" in name for name in edit.tensors)


def test_the_order_of_concepts_is_of_no_account_without_noise(model):
    config = dataclasses.replace(PLAIN, ipf=True, iec=True)
    for w in values(model).values():
        one, two = (
            solved(model, given(model, erase, preserve), w, config)[0].matrix()
            for erase, preserve in (
                (["church", "dog"], ["castle", "house", "art"]),
                (["dog", "church"], ["art", "house", "castle"]),
            )
        )
        assert relative(one - two, one) < 1e-9


def test_noise_comes_from_the_generator_and_is_of_little_account(model):
    """Whatever is drawn, it closes the same direction; the drawn rows themselves differ."""
    config = speed.Config(cut=1e-6)
    edits = [
        speed.fit(model, "church", KEEP, config=config, generator=one)
        for one in (None, *(torch.Generator().manual_seed(seed) for seed in (0, 1)))
    ]
    assert edits[0].digest == edits[1].digest
    for name, tensor in edits[1].tensors.items():
        torch.testing.assert_close(tensor, edits[2].tensors[name])
    rows, w = given(model), next(iter(values(model).values()))
    drawn = [
        speed.augmented(rows.preserved, w, 10, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and relative(drawn[0] - drawn[2], drawn[0]) > 1e-3


def test_nothing_named_to_preserve_means_everything_else(model):
    rows = given(model, preserve=())
    assert {"pizza", "zebra"} <= set(rows.concepts["preserve"]) and len(rows.preserved) > 70
    assert given(model, "dog", ()).concepts["preserve"].count("hot dog") == 0


@pytest.mark.parametrize(
    ("erase", "preserve", "said"),
    [
        ("church", ["church"], "both erased and preserved"),
        ([], (), "nothing to erase"),
        ("church", (), "preserve less"),
    ],
)
def test_bad_input(model, erase, preserve, said):
    """Eighty rows of 32 numbers leave nothing free."""
    with pytest.raises(ValueError, match=said):
        speed.fit(model, erase, preserve, config=PLAIN)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"projections": "all"}, "projections must be one of values, keys, both"),
        ({"tokens": "last"}, "tokens must be one of last_subject, all"),
        ({"cut": -1.0}, "cut must be at least 0"),
        ({"augment": 0}, "augment must be at least 1"),
        ({"centres": 1.5}, "centres must be a whole number"),
        ({"templates": ()}, "at least one template"),
        ({"preserve_templates": ("a",)}, "exactly one"),
    ],
)
def test_bad_settings(changes, said):
    with pytest.raises(ValueError, match=said):
        speed.Config(**changes)


def test_dependent_rows_want_a_ridge(model):
    same = ek.Concept("church", templates=("{}", "{}"))
    with pytest.raises(ValueError, match="raise retain_scale"):
        speed.fit(model, same, KEEP, config=dataclasses.replace(PLAIN, retain_scale=0.0))
    assert speed.fit(model, same, KEEP, config=PLAIN).nbytes


def test_another_family_is_refused(shared_model, monkeypatch):
    monkeypatch.setattr(type(shared_model), "own_loop", False)
    with pytest.raises(ValueError, match="erase by uce or rece"):
        speed.fit(shared_model, "church")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_an_accelerator():
    there, here = (
        speed.fit(ek.load(pipeline), "church", KEEP, config=speed.Config(cut=1e-6))
        for pipeline in (tiny_pipeline().to("cuda"), tiny_pipeline())
    )
    assert there.tensors.keys() == here.tensors.keys()
    for name, tensor in there.tensors.items():
        torch.testing.assert_close(tensor, here.tensors[name], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_dogs_go_and_cats_stay(tmp_path):
    check_dogs_go_and_cats_stay(speed, tmp_path)
