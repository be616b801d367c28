"""DP: what is preserved does not move, what is erased arrives, and neither has a weight to trade."""

import dataclasses

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import erasekit as ek
from erasekit.closed_form import residuals
from erasekit.concepts import subject_span
from erasekit.layers import cross_attention_kv
from erasekit.methods import dp

TOKENS = "zyxw"  # no word of the tokenizer: a token for each letter
PLAIN = dp.Config(preserve_null=False)


def given(model, erase, preserve, anchor=" ", config=PLAIN):
    return dp.rows(model, model.concepts(erase), model.concepts(preserve), anchor, config)


def relative(difference, size) -> float:
    return float(difference.norm() / size.norm())


def test_preserved_rows_do_not_move_and_erased_ones_arrive(model):
    """Both exactly, to 1e-9; the control is UCE, which trades one against the other."""
    rows = given(model, "church", ["castle", "house"])
    t, told = dp.solve(rows, PLAIN)
    assert relative(t.apply(rows.sources) - rows.targets, rows.targets) < 1e-9
    assert relative(t.apply(rows.preserved) - rows.preserved, rows.preserved) < 1e-9
    assert 0 < told["free"] < 1 and told["condition"] == pytest.approx(1.0)
    soft = ek.uce.fit(model, "church", ["castle", "house"], config=ek.uce.Config(preserve_null=False))
    found = residuals(soft.context_map, rows)
    assert found["preserve_drift"] > 1e-6 and found["erase_residual"] > 1e-6


def test_it_is_the_update_of_every_weight_as_the_code_writes_it(model):
    """W' = W0 + W0 (c* - c) x^T U2^T / ||x||^2, one weight at a time, with U2 from a full singular decomposition."""
    rows = given(model, "church", "castle")
    t, _ = dp.solve(rows, PLAIN)
    u, s, _ = torch.linalg.svd(rows.preserved.T, full_matrices=True)
    u2 = u[:, int((s > 1e-6).sum()) :]
    (c,), (c_star,) = rows.sources, rows.targets
    x = u2.T @ c
    for layer in cross_attention_kv(model.unet).values():
        w = layer.weight.detach().double()
        literal = w + torch.outer(w @ (c_star - c), u2 @ x) / x.square().sum()
        assert relative(t.apply_to_weight(w) - literal, literal) < 1e-10


def test_all_tokens_at_once_hold_where_one_after_another_undo_each_other(model):
    rows = given(model, TOKENS, "castle")
    assert len(rows.sources) == len(TOKENS)
    missed = lambda config: relative(
        dp.solve(rows, config)[0].apply(rows.sources) - rows.targets, rows.targets - rows.sources
    )
    assert missed(PLAIN) < 1e-8
    assert missed(dataclasses.replace(PLAIN, joint=False)) > 1e-3
    for joint in (True, False):  # neither touches what is preserved
        t, _ = dp.solve(rows, dataclasses.replace(PLAIN, joint=joint))
        assert relative(t.apply(rows.preserved) - rows.preserved, rows.preserved) < 1e-8


def test_the_order_of_concepts_is_of_no_account_for_the_joint_form_alone(model):
    both = {}
    for joint in (True, False):
        config = dataclasses.replace(PLAIN, joint=joint)
        maps = [
            dp.solve(given(model, order, "castle", config=config), config)[0].matrix()
            for order in (["church", "dog"], ["dog", "church"])
        ]
        both[joint] = relative(maps[0] - maps[1], maps[0])
    assert both[True] < 1e-9 < 1e-6 < both[False]


def test_the_target_lies_in_the_span_of_the_guides(model):
    """Of several guides the nearest point of their span; of one the guide itself."""
    c, guides = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best = torch.linalg.lstsq(guides.T, c.T).solution.T @ guides
    torch.testing.assert_close(dp.projected(c, guides), best)
    assert torch.equal(dp.projected(c, guides[:1]), guides[:1].expand(3, -1))
    rows = given(model, "church", "castle", anchor="dog house")
    tokens = model.encode("dog house")[0].double()[
        list(subject_span(model.tokenizer, "dog house", "dog house"))
    ]
    assert len(tokens) == 2
    torch.testing.assert_close(rows.targets, dp.projected(rows.sources, tokens))


def test_a_blank_anchor_is_the_token_before_the_slot(model):
    rows = given(model, "church", (), config=dataclasses.replace(PLAIN, templates=("a {} in ink style",)))
    blank = model.encode("a  in ink style")[0].double()
    assert rows.preserved is None
    torch.testing.assert_close(rows.targets[0], blank[1])


@pytest.mark.parametrize("template", ["dog with a {}", "a {} with a dog"])
def test_of_two_words_alike_the_one_in_the_slot_is_erased(model, template):
    """And of its anchor as well."""
    config = dataclasses.replace(PLAIN, templates=(template,))
    rows = given(model, "dog", (), anchor="house", config=config)
    slot = 1 + template.split().index("{}") + 3 * (template[0] == "d")  # "with" is four letters, each a token
    for phrase, found in (("dog", rows.sources), ("house", rows.targets)):
        torch.testing.assert_close(found, model.encode(template.format(phrase))[0].double()[slot : slot + 1])
    back = given(model, "church", (), anchor="dog", config=config)
    torch.testing.assert_close(back.targets, rows.sources)


@pytest.mark.parametrize("name", ["templates", "preserve_templates"])
def test_no_template_is_refused_for_nothing_would_be_erased_or_preserved(name):
    with pytest.raises(ValueError, match="at least one template"):
        dp.Config(**{name: ()})


def test_repeated_start_tokens_take_no_direction_with_a_cut_of_zero(model):
    rows = given(model, "church", ["castle", "house", "dog"])
    maps = [dp.solve(rows, dataclasses.replace(PLAIN, cut=cut))[0].matrix() for cut in (0.0, 1e-6)]
    assert torch.equal(*maps)


def test_with_nothing_preserved_all_is_on_the_device_of_the_rows(model, monkeypatch):
    """Rows without values stand for those of an accelerator; the control: a projection on the CPU fails there."""
    rows = given(model, TOKENS, ())
    on = lambda device: dataclasses.replace(
        rows, sources=torch.zeros_like(rows.sources, device=device),
        targets=torch.zeros_like(rows.targets, device=device),
    )  # fmt: skip
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: False)  # they have none to compare
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: 1.0)
    t, _ = dp.solve(on("meta"), dataclasses.replace(PLAIN, joint=False))
    assert t.left.device.type == t.right.device.type == "meta"
    monkeypatch.setattr(
        torch.linalg, "eigvalsh", lambda gram: torch.ones(len(gram))
    )  # an index wants a driver
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = on("cuda")
        with pytest.raises(ValueError, match="not independent"):  # the last comparison, after all projections
            dp.solve(there, PLAIN)
        with pytest.raises(RuntimeError, match="same device"):
            there.sources @ dp.complement(None, rows.sources.shape[1], 0.0)


def test_a_ridge_makes_dependent_rows_solvable_and_costs_exactness(model):
    same = ek.Concept("church", templates=("{}", "{}"))
    with pytest.raises(ValueError, match="set ridge"):
        dp.solve(given(model, same, "castle"), PLAIN)
    config = dataclasses.replace(PLAIN, ridge=1e-3)
    rows = given(model, same, "castle", config=config)
    t, told = dp.solve(rows, config)
    assert told["condition"] > 1e12
    assert 1e-6 < relative(t.apply(rows.sources) - rows.targets, rows.targets - rows.sources) < 1e-2


@pytest.mark.parametrize(
    ("erase", "preserve", "said"),
    [
        ("church", ["church"], "both erased and preserved"),
        ([], (), "nothing to erase"),
    ],
)
def test_bad_input(model, erase, preserve, said):
    with pytest.raises(ValueError, match=said):
        ek.dp.fit(model, erase, preserve)


def test_another_family_is_refused(shared_model, monkeypatch):
    monkeypatch.setattr(type(shared_model), "own_loop", False)
    with pytest.raises(ValueError, match="erase by uce or rece"):
        ek.dp.fit(shared_model, "church")


def test_what_lies_in_the_preserved_span_is_refused_and_not_left_in_silence(model):
    rows = given(model, "church", "castle")
    inside = dataclasses.replace(rows, sources=rows.preserved[1:2])
    with pytest.raises(ValueError, match="in the span of what is preserved"):
        dp.solve(inside, PLAIN)


def test_the_edit_changes_the_concept_and_leaves_a_prompt_that_is_preserved_whole(model):
    """Without guidance, which reads the empty prompt; the control: padding that is not preserved moves the picture."""
    draw = lambda prompt: np.asarray(model.generate([prompt], seeds=[0], steps=2, guidance=1.0)[0]).astype(
        int
    )
    before = {prompt: draw(prompt) for prompt in ("church", "castle")}
    moved, states = {}, []
    for tokens in ("all", "real"):
        config = dataclasses.replace(PLAIN, preserve_tokens=tokens)
        edit = ek.dp.fit(model, "church", "castle", config=config, callback=states.append)
        with edit.applied(model):
            moved[tokens] = {prompt: np.abs(draw(prompt) - one).max() for prompt, one in before.items()}
    assert moved["all"]["church"] > 5 and moved["all"]["castle"] <= 1 < moved["real"]["castle"]
    assert states[0]["erase_residual"] < 1e-9 and states[0]["rank"] == 1
    assert all(np.array_equal(draw(prompt), one) for prompt, one in before.items())


def test_padding_is_not_preserved_for_it_would_leave_nothing_free(model):
    """The tokens of a preserved prompt are few; with its padding they span all that there is."""
    rows = given(model, "church", ["castle", "house"])
    assert len(rows.preserved) == 2 * 3  # start, word, end
    everything = dataclasses.replace(PLAIN, preserve_tokens="all")
    with pytest.raises(ValueError, match="preserve less"):
        ek.dp.fit(model, "church", ["castle", "house"], config=everything)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_an_accelerator():
    from conftest import tiny_pipeline

    there, cpu = ek.load(tiny_pipeline().to("cuda")), ek.load(tiny_pipeline())
    for joint in (True, False):
        for preserve in ("castle", ()):
            edit, here = (
                ek.dp.fit(model, "church", preserve, config=dataclasses.replace(PLAIN, joint=joint))
                for model in (there, cpu)
            )
            torch.testing.assert_close(
                edit.context_map.matrix(), here.context_map.matrix(), rtol=0, atol=1e-3
            )
