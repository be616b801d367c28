"""UCE end to end on the tiny model, against a literal reading of the authors' algorithm."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import LENGTH, aligned, block, literal_erase, tiny_pipeline

import erasekit as ek
from erasekit import models
from erasekit.concepts import Concept
from erasekit.layers import cross_attention_kv
from erasekit.methods import METHODS

PLAIN = ek.uce.Config(lam=0.1, preserve_scale=0.5)


def per_layer_reference(model, erase, preserve, anchor, config):
    """New weights {name: float64}, every layer by itself (2023 code)."""
    pairs = [pair for phrase in erase for pair in zip(*aligned(model, phrase, anchor), strict=True)]
    kept = [row for phrase in [*preserve, ""] for row in block(model, phrase)]
    scales = config.erase_scale, config.preserve_scale, config.lam
    return {
        name: literal_erase(layer.weight.detach().double(), pairs, kept, *scales)
        for name, layer in cross_attention_kv(model.unet).items()
    }


def pictures(model, prompts, guidance=5.0):
    return np.stack([np.asarray(p) for p in model.generate(prompts, steps=4, guidance=guidance)]).astype(int)


@pytest.mark.parametrize("anchor", [" ", "art", "garbage"])
@pytest.mark.parametrize("erase", [["church"], ["church", "garbage", "dog"]])
def test_agrees_with_the_literal_algorithm(shared_model, erase, anchor):
    expected = per_layer_reference(shared_model, erase, ["house", "castle"], anchor, PLAIN)
    edit = ek.uce.fit(shared_model, erase, ["house", "castle"], anchor=anchor, config=PLAIN)
    for name, layer in cross_attention_kv(shared_model.unet).items():
        w = layer.weight.detach().double()
        found = edit.context_map.apply_to_weight(w)
        # 1e-5 and not 1e-10: an edit holds its factors in float32 (test_closed_form has the float64 theorem)
        assert (found - expected[name]).norm() < 1e-5 * expected[name].norm()
        assert (w - expected[name]).norm() > 1e-2 * expected[name].norm()


def test_fit_changes_nothing_and_repeats_itself(model):
    before = {name: t.clone() for name, t in model.unet.state_dict().items()}
    first = ek.uce.fit(model, "church", ["house"])
    assert all(torch.equal(t, before[name]) for name, t in model.unet.state_dict().items())
    assert ek.uce.fit(model, erase=Concept("church"), preserve="house").digest == first.digest
    assert ek.uce.fit(model, "dog", ["house"]).digest != first.digest
    assert first.metadata["method"] == "uce" and first.metadata["concepts"]["erase"] == ["church"]
    assert (
        ek.uce.Config(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in first.metadata["config"].items()}
        )
        == ek.uce.PRESETS["sd14-object"]
    )


def test_the_erased_prompt_becomes_its_anchor(shared_model):
    """With hardly any ridge and every token mapped, "church" draws exactly what "house" draws, "dog" still a
    dog."""
    config = dataclasses.replace(PLAIN, lam=1e-6, tokens="last_subject", preserve_tokens="last_subject")
    prompts = ["church", "house", "dog"]
    plain = shared_model.encode(prompts).double()
    edit = ek.uce.fit(shared_model, "church", "dog", anchor="house", config=config)
    mapped = edit.context_map.apply(plain)
    assert (mapped[0, 1] - plain[1, 1]).norm() < 1e-3 * plain[1, 1].norm()
    assert (mapped[2, 1] - plain[2, 1]).norm() < 1e-3 * plain[2, 1].norm()
    assert (plain[0, 1] - plain[1, 1]).norm() > 0.1 * plain[1, 1].norm()


def test_pictures_of_the_erased_concept_move_toward_the_anchor(model):
    """Without guidance, whose unconditional half the edit would move too."""
    config = dataclasses.replace(PLAIN, lam=1e-4, tokens="all", preserve_null=False)
    church, house = pictures(model, ["church", "house"], guidance=1.0)
    with ek.uce.fit(model, "church", anchor="house", config=config).applied(model):
        edited = pictures(model, ["church"], guidance=1.0)[0]
    assert np.abs(edited - house).mean() < 0.2 * np.abs(church - house).mean()
    assert np.array_equal(pictures(model, ["church"], guidance=1.0)[0], church)


def test_preserving_keeps_a_neighbor_nearer(shared_model):
    house = shared_model.encode("house")[0].double()

    def drift(**kwargs):
        edit = ek.uce.fit(shared_model, "church", anchor="dog", config=PLAIN, **kwargs)
        return float((edit.context_map.apply(house) - house).norm())

    assert drift(preserve=["house"]) < 0.7 * drift()


def test_order_of_concepts_is_irrelevant(shared_model):
    one, two = (
        ek.uce.fit(shared_model, erase, preserve).context_map.matrix()
        for erase, preserve in (
            (["church", "dog"], ["house", "castle"]),
            (["dog", "church"], ["castle", "house"]),
        )
    )
    assert (one - two).norm() < 1e-5 * one.norm()


def test_joint_solve_is_not_the_chain(shared_model):
    """Erasing two at once and one after the other are different edits: concepts interfere."""
    joint = ek.uce.fit(shared_model, ["church", "dog"]).context_map.matrix()
    chain = ek.uce.fit(shared_model, "church").compose(ek.uce.fit(shared_model, "dog")).context_map.matrix()
    assert (joint - chain).norm() > 1e-2 * joint.norm()


@pytest.mark.parametrize("tokens, rows", [("last_subject", 1), ("last_to_end", LENGTH - 2), ("all", LENGTH)])
def test_token_policies(shared_model, tokens, rows):
    """ "a church" against "a dog": from the word on, or everything; rank says how many rows were mapped."""
    config = dataclasses.replace(PLAIN, tokens=tokens, templates=("a {}",))
    seen = []
    ek.uce.fit(shared_model, "church", anchor="dog", config=config, callback=seen.append)
    (state,) = seen
    assert state["rank"] <= min(rows, LENGTH - 2)  # the first two rows are equal and move nothing
    assert 0 < state["erase_residual"] < 1 and 0 <= state["preserve_drift"] < 1


def test_rows_start_at_the_concept_in_every_template(shared_model):
    """The word may have other numbers of pieces than its anchor and stand in the middle of a sentence."""
    from erasekit.prompt_rows import _embedder, _paired_slots

    template, tokenizer = "a {} in flat style", shared_model.tokenizer
    embed = _embedder(shared_model, [(template, "garbage"), (template, "dog"), (template, " ")])
    old, new = _paired_slots(tokenizer, embed, template, "garbage", "dog", "last_to_end")
    assert torch.equal(old, embed(template, "garbage")[7:]) and len(old) == LENGTH - 7
    assert torch.equal(new, embed(template, "dog")[2 : 2 + len(old)])
    old, new = _paired_slots(tokenizer, embed, template, "garbage", " ", "last_subject")
    assert torch.equal(old, embed(template, "garbage")[7:8])
    assert torch.equal(new, embed(template, " ")[1:2])  # "a", the token before the empty slot


def test_templates_and_synonyms_add_rows(shared_model):
    church = Concept("church", synonyms=("castle",), anchor="dog")
    base = dataclasses.replace(PLAIN, tokens="last_subject")

    def erased(concept=church, **changes):
        return ek.uce.fit(shared_model, concept, config=dataclasses.replace(base, **changes))

    assert erased().context_map.rank == 1 and erased().metadata["concepts"]["anchor"] == ["dog"]
    assert erased(synonyms=True).context_map.rank == 2
    assert erased(templates=("{}", "a {}", "an image of {}")).context_map.rank == 3
    own = dataclasses.replace(church, templates=("a {}", "an {} image"))
    assert erased(own).context_map.rank == 2
    given = ek.uce.fit(shared_model, church, anchor="house", config=base)
    assert given.metadata["concepts"]["anchor"] == ["house"]  # the argument wins


def test_erasing_to_itself_is_the_identity(shared_model):
    with pytest.warns(UserWarning, match="church: its own anchor, so nothing is put in its place"):
        edit = ek.uce.fit(shared_model, "church", anchor="church")
    assert edit.context_map.rank == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"erase": []}, "nothing to erase"),
        ({"erase": ""}, "needs a name"),
        ({"erase": 3}, "expected text or a Concept, got int"),
        ({"erase": "a " * 40}, "the limit is"),
        ({"erase": "church", "preserve": ["house", "Church"]}, "church cannot be both erased and preserved"),
        ({"erase": "church", "config": ek.uce.Config(lam=0.0, preserve_null=False)}, "singular"),
    ],
)
def test_bad_requests(shared_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        ek.uce.fit(shared_model, **arguments)


def test_unknown_concepts_of_the_emoji_world(shared_model, monkeypatch):
    monkeypatch.setattr(shared_model, "preset", "emoji")
    for arguments in (
        {"erase": "zzz"},
        {"erase": "church", "preserve": ["zzz"]},
        {"erase": "church", "anchor": "zzz"},
    ):
        with pytest.raises(ValueError, match="unknown concept 'zzz'"):
            ek.uce.fit(shared_model, **arguments)


def test_a_broken_text_encoder_is_noticed(model):
    with torch.no_grad():
        model.text_encoder.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        ek.uce.fit(model, "church")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lam": -1}, "lam must be"),
        ({"lam": "1"}, "lam must be at least 0, got '1'"),
        ({"lam": True}, "lam must be at least 0, got True"),
        ({"preserve_scale": float("inf")}, "preserve_scale must be"),
        ({"tokens": "first"}, "tokens must be one of last_subject, last_to_end, all"),
        ({"templates": ("a dog",)}, "exactly one"),
        ({"templates": ()}, "at least one prompt"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        ek.uce.Config(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"synonyms": "dog"}, "synonyms are a sequence of phrases, got 'dog'"),
        ({"synonyms": ("dog", " ")}, "synonyms are a sequence"),
        ({"synonyms": (5,)}, "synonyms are a sequence"),
        ({"templates": (5,)}, "exactly one {}, got 5"),
        ({"anchor": Concept("dog")}, "anchor is text, got .*: give its name"),
    ],
)
def test_a_concept_that_is_not_made_of_text_is_refused(changes, message):
    """No text stands for the letters it is made of."""
    with pytest.raises(ValueError, match=message):
        Concept("church", **changes)


def test_a_concept_made_of_lists_is_the_one_made_of_tuples(shared_model):
    lists = Concept("church", templates=["a {}"], synonyms=["castle"])
    assert lists == Concept("church", templates=("a {}",), synonyms=("castle",))
    assert ek.uce.fit(shared_model, [lists, lists]).metadata["concepts"]["erase"] == ["church"]


def test_a_synonym_that_is_erased_is_not_preserved(shared_model):
    church = Concept("church", synonyms=("Castle",))
    with pytest.raises(ValueError, match="castle cannot be both erased and preserved"):
        ek.uce.fit(shared_model, church, "castle", config=dataclasses.replace(PLAIN, synonyms=True))
    assert ek.uce.fit(shared_model, church, "castle", config=PLAIN).context_map.rank  # it is not erased


def test_the_table_of_methods():
    assert METHODS["uce"] is ek.uce
    assert {"emoji", "sd14-object", "sd14-nudity", "sd14-artist"} <= set(ek.uce.PRESETS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    cpu, gpu = models.load(tiny_pipeline()), models.load(tiny_pipeline(), device="cuda")
    half = models.load(tiny_pipeline(), device="cuda", dtype=torch.float16)
    assert cpu.fingerprint() == gpu.fingerprint() == half.fingerprint()
    edit = ek.uce.fit(gpu, "church", ["house"])
    reference = ek.uce.fit(cpu, "church", ["house"])
    assert all(t.device.type == "cpu" for t in edit.tensors.values())
    assert (edit.context_map.matrix() - reference.context_map.matrix()).norm() < 1e-2
    before = {name: t.clone() for name, t in half.unet.state_dict().items()}
    prompts = ["church", "house", "dog"]
    plain = pictures(gpu, prompts)
    assert np.abs(plain - pictures(cpu, prompts)).mean() < 5  # the same noise on every device
    with edit.applied(gpu), edit.applied(half):
        assert np.abs(pictures(gpu, prompts) - plain).max() > 20
        assert pictures(half, prompts).shape == plain.shape
    assert all(torch.equal(t, before[name]) for name, t in half.unet.state_dict().items())
