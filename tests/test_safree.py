"""SAFREE: which tokens are flagged, what becomes of their rows, and that no other row moves."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline

import erasekit as ek
from erasekit.concepts import token_ids
from erasekit.filters import safree as filtered
from erasekit.filters import without_each
from erasekit.methods import safree


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def onto(rows: torch.Tensor) -> torch.Tensor:
    """The projection onto the span of rows, by an orthonormal basis."""
    q, _ = torch.linalg.qr(rows.T)
    return q @ q.T


def picture(model, prompt="a church", seed=0):
    return np.asarray(model.generate([prompt], seeds=[seed], steps=3)[0]).astype(int)


def test_it_is_the_formula_token_by_token():
    e, p, c = draw(4, 6, 12), draw(4, 6, 12, seed=1), draw(2, 12, seed=2)
    real = torch.tensor(
        [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    ).bool()
    found, leave, flags = filtered(e, p, real, c, alpha=0.05, scale=0.5), torch.eye(12) - onto(c), 0
    for k in range(4):
        inside = onto(p[k, real[k]])
        for i in range(6):
            others = [float((leave @ p[k, j]).norm()) for j in range(6) if real[k, j] and j != i]
            flagged = real[k, i] and others and (leave @ p[k, i]).norm() >= 1.05 * np.mean(others)
            flags += bool(flagged)
            wanted = e[k, i] + 0.5 * (leave @ inside @ e[k, i] - e[k, i]) if flagged else e[k, i]
            torch.testing.assert_close(found[k, i], wanted, rtol=0, atol=1e-10)
            assert flagged or torch.equal(found[k, i], e[k, i])
    assert 2 <= flags <= 7 and torch.equal(found[3], e[3])  # one token alone is not flagged


def test_a_flagged_row_has_nothing_of_the_concept():
    e, p, c = draw(1, 4, 12), draw(1, 4, 12, seed=1), draw(2, 12, seed=2)
    p[:, 1:3] = 0.1 * p[:, 1:3]
    real = torch.tensor([[False, True, True, True]])
    found = filtered(e, p, real, c, alpha=0.0)
    assert (
        torch.equal(found[0, :3], e[0, :3])
        and (found[0, 3] @ c.T).abs().max() < 1e-9 < (e[0, 3] @ c.T).abs().max()
    )


def test_the_pooled_prompts_are_those_of_the_model_without_each_token(model):
    ids = token_ids(model.tokenizer, ["a dog house", "church"])
    end = model.tokenizer.eos_token_id
    masked, real = without_each(model.text_encoder, ids, end)
    assert real.sum(1).tolist() == [3, 1] and real[0, 1:4].all() and masked[:, 4:].abs().max() == 0
    assert (masked.norm(dim=-1)[real] > 0).all()
    for i in (1, 2, 3):
        seen = torch.ones_like(ids[:1])
        seen[0, i] = 0
        alone = model.text_encoder(ids[:1], attention_mask=seen).pooler_output[0]
        torch.testing.assert_close(masked[0, i], alone)
    assert not torch.allclose(masked[0, 1], masked[0, 2])


def test_a_prompt_without_its_end_is_refused(model):
    with (
        safree.fit(model, "church").applied(model),
        pytest.raises(ValueError, match="looks for the end token"),
    ):
        model.encode("a church", length=3)


def test_it_knows_the_tokens_of_an_attack_by_what_the_encoder_finds_there(model):
    """Embeddings in place of a token, as attacks put them, flag as the token itself does."""
    from erasekit.layers import embedded_as, token_table

    ids = token_ids(model.tokenizer, ["a church in ink"])
    rows, hidden = token_table(model.text_encoder)[ids], ids.clone()
    hidden[0, 2] = 0
    end = model.tokenizer.eos_token_id
    wanted, _ = without_each(model.text_encoder, ids, end)
    with embedded_as(model.text_encoder, hidden, rows):
        torch.testing.assert_close(without_each(model.text_encoder, hidden, end)[0], wanted)


def test_the_edit_moves_flagged_rows_alone_and_is_undone(model):
    plain, before = picture(model), model.encode(["a church", "church", ""])
    edit = safree.fit(model, "church", config=safree.Config(alpha=0.0))
    with edit.applied(model):
        after, drawn = model.encode(["a church", "church", ""]), picture(model)
    moved = (after - before).norm(dim=-1) > 0
    assert moved[0].sum() >= 1 and not moved[0, 3:].any() and not moved[0, 0] and not moved[1:].any()
    assert np.abs(drawn - plain).max() > 2 and np.array_equal(picture(model), plain)
    with safree.fit(model, "church", config=safree.Config(alpha=1e6)).applied(model):  # the control
        assert np.array_equal(picture(model), plain)


def test_the_stock_pipeline_draws_the_same_and_a_file_gives_it_back(model, tmp_path):
    edit = safree.fit(
        model, ["church", "dog"], ["house"], config=safree.Config(alpha=0.0, templates=("{}", "a {}"))
    )
    assert edit.tensors["concepts"].shape[0] == 4 and edit.metadata["concepts"]["preserve"] == ["house"]
    edit.save(tmp_path / "edit.safetensors")
    model.pipeline.set_progress_bar_config(disable=True)
    with ek.Edit.load(tmp_path / "edit.safetensors").applied(model):
        ours = picture(model)
        stock = model.pipeline(
            "a church", num_inference_steps=3, guidance_scale=3.0, height=16, width=16,
            generator=[torch.Generator().manual_seed(0)],
        ).images[0]  # fmt: skip
    assert np.abs(np.asarray(stock).astype(int) - ours).max() <= 1


def test_the_gradient_of_an_attack_passes(model):
    table = model.text_encoder.get_input_embeddings().weight
    ids = token_ids(model.tokenizer, ["a church"])
    with safree.fit(model, "church", config=safree.Config(alpha=0.0)).applied(model):
        (gradient,) = torch.autograd.grad(model.text_encoder(ids)[0].square().sum(), table)
    assert gradient.isfinite().all() and gradient[ids[0, 2]].abs().max() > 0


def test_it_tells_what_it_did_and_knows_its_presets(model):
    states = []
    edit = safree.fit(model, "church", callback=states.append)
    assert states == [{"step": 0, "concepts": 1, "rows": 1}] and edit.kind == "prompt_filter"
    assert edit.metadata["filter"]["alpha"] == 0.01
    own = safree.PRESETS["emoji"]
    assert own == dataclasses.replace(safree.PRESETS["sd14-object"], alpha=own.alpha)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"erase": "church", "preserve": ["church"]}, "both erased and preserved"),
        ({"erase": []}, "nothing to erase"),
        ({"erase": "church", "anchor": "house"}, "nothing in the place of a concept"),
    ],
)
def test_bad_input(model, given, said):
    with pytest.raises(ValueError, match=said):
        ek.safree.fit(model, **given)


@pytest.mark.parametrize(
    ("changes", "said"), [({"alpha": -1}, "alpha must"), ({"templates": ("x",)}, "exactly one")]
)
def test_bad_settings(changes, said):
    with pytest.raises(ValueError, match=said):
        safree.Config(**changes)


def test_another_family_is_refused(model, monkeypatch):
    monkeypatch.setattr(type(model), "own_loop", False)
    with pytest.raises(ValueError, match="erase by uce or rece"):
        ek.safree.fit(model, "church")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_an_accelerator():
    for dtype in (torch.float32, torch.float16):
        there = ek.load(tiny_pipeline(), device="cuda", dtype=dtype)
        plain = picture(there)
        with ek.safree.fit(there, "church", config=safree.Config(alpha=0.0)).applied(there):
            assert np.abs(picture(there) - plain).max() > 2
        assert np.array_equal(picture(there), plain)
