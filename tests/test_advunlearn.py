"""AdvUnlearn: the attacker, both levels of the objective, the retain set, and the text encoder as an edit."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from conftest import WIDTH, tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModel

import erasekit as ek
from erasekit import models
from erasekit.concepts import Concept, content_ids
from erasekit.layers import text_parameters, token_table
from erasekit.methods import advunlearn
from erasekit.methods.advunlearn import adversary, attack_loss, slots, turn
from erasekit.retained import COCO, _sentence, retained
from erasekit.states import States

SHORT = advunlearn.Config(
    iterations=5, lr=1e-3, batch=2, warmup=1, attack_steps=3, alpha=1e-2, retain_batch=3, sampler=5, noises=2,
    states="cached", templates=("{}", "a {}"), retain_templates=("a {}", "{} in ink style"),
)  # fmt: skip
KEEP = ["dog", "house", "castle", "art"]
PLACEMENTS = ("prefix", "suffix", "replace", "add")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.states.FOLDER", tmp_path)


def trained(model, config, seed=0, erase="church", preserve=KEEP, **more):
    """What the callback saw, and the edit."""
    seen = []
    generator = torch.Generator().manual_seed(seed)
    edit = advunlearn.fit(
        model, erase, preserve, config=config, generator=generator, callback=seen.append, **more
    )
    return seen, edit


def of(seen, name):
    return [state[name] for state in seen]


def table(model):
    return token_table(model.text_encoder)


@pytest.fixture
def points(shared_model):
    """Eight states of one prompt each, batch 2."""
    states = States(shared_model, ["church", "a church"], 3, 3.0, 5, "cached", 4)
    generator = torch.Generator().manual_seed(1)
    return [states.at(states.pick(torch.tensor([0, 1]), generator)) for _ in range(8)]


def begin(model, where, seed=0):
    size = where.base.shape
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * table(model).std()


# Where the attack stands


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements(shared_model, placement):
    tokenizer, k = shared_model.tokenizer, 2
    where = slots(shared_model, ["a church"], replace(SHORT, placement=placement, k=k))
    (a, church), end = content_ids(tokenizer, "a church"), tokenizer.eos_token_id
    start, ids = tokenizer.bos_token_id, where.ids[0][0].tolist()
    free = where.free[0].nonzero().flatten().tolist()
    assert len(ids) == tokenizer.model_max_length and ids[0] == start
    assert {
        "prefix": ids[3:6] == [a, church, end] and free == [1, 2],
        "suffix": ids[1:3] == [a, church] and ids[5] == end and free == [3, 4],
        "replace": ids[3:6] == [end, end, end] and free == [1, 2],
        "add": ids[3] == end and free == [1, 2],
    }[placement]
    # with the embeddings of real tokens in place, it is the prompt with these tokens
    words = table(shared_model)[torch.tensor(content_ids(tokenizer, "dog ink"))][None]
    same = {"prefix": "dog ink a church", "suffix": "a church dog ink", "replace": None, "add": "a church"}
    if same[placement]:
        given = torch.zeros_like(words) if placement == "add" else words
        found = where.text([shared_model.text_encoder], given).rows
        assert torch.allclose(found, shared_model.encode(same[placement]), atol=1e-5)


def test_a_suffix_cannot_reach_the_concept(shared_model):
    for placement, moves in (("suffix", False), ("prefix", True)):
        where = slots(shared_model, ["a church"], replace(SHORT, placement=placement))
        one, other = (
            where.text([shared_model.text_encoder], begin(shared_model, where, s)).rows[0] for s in (0, 1)
        )
        at = where.ids[0][0].tolist().index(content_ids(shared_model.tokenizer, "church")[0])
        assert torch.equal(one[at], other[at]) != moves
        assert not torch.equal(one[-1], other[-1])


def test_prompts_of_different_length_have_their_own_slots(shared_model):
    where = slots(shared_model, ["church", "a church in ink"], replace(SHORT, placement="add"))
    assert where.exists.sum(1).tolist() == [1, 4] and where.base.shape == (2, 4, WIDTH)
    text = where.text([shared_model.text_encoder], torch.zeros_like(where.base)).rows
    assert torch.allclose(text, shared_model.encode(["church", "a church in ink"]), atol=1e-5)


def test_a_prompt_that_leaves_no_room_is_an_error(shared_model):
    with pytest.raises(ValueError, match="the limit is"):
        slots(shared_model, ["church " * 22], replace(SHORT, k=1))


def test_the_code_counts_words_for_tokens(shared_model):
    pieces = content_ids(shared_model.tokenizer, "zebra")
    right, official = (
        slots(shared_model, ["zebra"], replace(SHORT, states="frozen", faithful=f)) for f in (False, True)
    )
    assert len(pieces) > 1
    assert right.ids[0][0, 2 : 2 + len(pieces)].tolist() == pieces
    assert official.ids[0][0, 2] == pieces[0] and official.ids[0][0, 3] == shared_model.tokenizer.eos_token_id


# The attacker


def attacked(model, points, config, start=None, count=None):
    where = slots(model, ["church", "a church"], config)
    start = begin(model, where) if start is None else start
    return where, start, adversary(
        [model.text_encoder], model.unet, where, start, points[:count], config
    )  # fmt: skip


def gradient(model, where, delta, state):
    delta = delta.clone().requires_grad_(True)
    losses = attack_loss([model.text_encoder], model.unet, where, delta, state)
    return torch.autograd.grad(losses.sum(), delta)[0]


def test_no_steps_and_one_signed_step(shared_model, points):
    config = replace(SHORT, rule="sign")
    where, start, none = attacked(shared_model, points, config, count=0)
    assert torch.equal(none, start)
    _, _, one = attacked(shared_model, points, config, count=1)
    g = gradient(shared_model, where, start, points[0])
    assert torch.equal(one, start - config.alpha * g.sign())  # eq. 7, and it is the one that is used
    _, _, official = attacked(shared_model, points, replace(config, states="frozen", faithful=True), count=1)
    assert torch.equal(official, start)  # the code hands back the random token


def test_every_step_takes_its_own_gradient(shared_model, points):
    config = replace(SHORT, rule="gd", alpha=0.5)
    where, delta, found = attacked(shared_model, points, config)
    for state in points:
        delta = delta - config.alpha * gradient(shared_model, where, delta, state)
    assert torch.allclose(found, delta, atol=1e-5)


def test_the_codes_step_takes_the_sum_of_all(shared_model, points):
    config = replace(SHORT, states="frozen", faithful=True)
    where, start, found = attacked(shared_model, points, config, count=4)
    delta = torch.nn.Parameter(start.clone())
    adam, total = torch.optim.Adam([delta], lr=config.alpha), 0
    for state in points[:3]:  # the fourth step is taken and lost
        total = total + gradient(shared_model, where, delta.detach(), state)
        delta.grad = total.clone()
        adam.step()
    assert torch.allclose(found, delta.detach(), atol=1e-5)
    _, _, right = attacked(shared_model, points, SHORT, count=4)
    assert not torch.allclose(found, right, atol=1e-3)


def test_the_codes_fast_variant_never_turns(shared_model, points):
    moved = []
    for faithful in (True, False):
        config = replace(SHORT, states="frozen", rule="sign", alpha=0.1, faithful=faithful)
        ways = [attacked(shared_model, points, config, count=n)[2] for n in range(1, 8)]
        steps = [(b - a).sign() for a, b in zip(ways, ways[1:], strict=False)]
        moved.append(any(not torch.equal(a, b) for a, b in zip(steps[1:], steps[2:], strict=False)))
    assert moved == [False, True]


def test_a_signed_attack_stays_in_its_box(shared_model, points):
    config = replace(SHORT, rule="sign")
    _, start, found = attacked(shared_model, points, config)
    assert (found - start).abs().max() <= len(points) * config.alpha * (1 + 1e-5)
    assert (found - start).abs().max() > config.alpha


def test_the_attack_lowers_its_loss_and_chance_does_not(shared_model, points):
    config, same = replace(SHORT, rule="adam", alpha=0.02), [points[0]] * 20
    where, start, found = attacked(shared_model, same, config)
    with torch.no_grad():
        error = lambda d: attack_loss([shared_model.text_encoder], shared_model.unet, where, d, points[0])
        chance = start + (found - start).norm() * torch.nn.functional.normalize(
            begin(shared_model, where, 9), dim=(1, 2)
        )
        assert (error(found) < 0.9 * error(start)).all()
        assert (error(found) < error(chance)).all()


def test_the_attack_leaves_every_weight_alone(model, points):
    before = {n: p.clone() for m in (model.unet, model.text_encoder) for n, p in m.named_parameters()}
    attacked(model, points, SHORT)
    for module in (model.unet, model.text_encoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is None and torch.equal(parameter, before[name])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_latest_goes_on_where_the_last_attack_ended(shared_model, monkeypatch, placement):
    begun, ended = [], []

    def watched(encoders, unet, where, start, *rest):
        begun.append(start)
        ended.append(adversary(encoders, unet, where, start, *rest))
        return ended[-1]

    monkeypatch.setattr(advunlearn, "adversary", watched)
    config = replace(SHORT, placement=placement, templates=("a {}",), batch=1, iterations=4)
    trained(shared_model, replace(config, start="latest"))
    assert all(torch.equal(a, b) for a, b in zip(begun[1:], ended, strict=False)) and len(begun) == 3
    assert len({one.data_ptr() for one in (*begun, *ended)}) == 6  # nothing is shared
    begun.clear(), ended.clear()
    trained(shared_model, config)
    assert not any(torch.equal(a, b) for a, b in zip(begun[1:], ended, strict=False))


# The two levels


def test_at_the_start_nothing_is_lost(shared_model):
    seen, _ = trained(shared_model, replace(SHORT, iterations=4, warmup=2))
    assert seen[0]["retain"] < 1e-10 and seen[0]["attack"] < 1e-10  # the plain prompt, the frozen weights
    assert seen[3]["retain"] > 1e-6 and seen[3]["attack"] > 1e-6
    turned, _ = trained(shared_model, replace(SHORT, iterations=1, eta=-1.0))
    assert turned[0]["erase"] < 1e-10 < 1e-3 < seen[0]["erase"]


def test_the_loss_is_affine_in_gamma(shared_model):
    first = lambda gamma, keep: trained(
        shared_model, replace(SHORT, gamma=gamma, iterations=3), preserve=keep
    )[0]
    for gamma in (0.3, 2.0):
        for state in first(gamma, KEEP):
            assert state["loss"] == pytest.approx(state["erase"] + gamma * state["retain"], rel=1e-5)
    at_once = [first(gamma, KEEP)[0] for gamma in (0.3, 2.0)]
    assert at_once[0]["erase"] == at_once[1]["erase"] and at_once[0]["retain"] == at_once[1]["retain"]
    assert of(first(0.0, KEEP), "loss") == of(first(0.0, ["art"]), "loss")
    assert of(first(0.5, KEEP), "loss") != of(first(0.5, ["art"]), "loss")


def test_cached_states_change_nothing_but_the_time(shared_model):
    calls = []
    forward = shared_model.unet.forward

    def counted(sample, *args, **kwargs):
        calls.append(len(sample))
        return forward(sample, *args, **kwargs)

    runs = {}
    for states in ("frozen", "cached"):
        calls.clear()
        shared_model.unet.forward = counted
        try:
            seen, edit = trained(shared_model, replace(SHORT, states=states, iterations=8))
        finally:
            del shared_model.unet.forward
        runs[states] = (of(seen, "loss"), edit, sum(calls))
    assert runs["cached"][0] == pytest.approx(runs["frozen"][0], rel=1e-4)
    # What the encoders say, not their weights: a key's bias has no effect, and so Adam moves it by rounding alone.
    before, one, other = (
        m.encode("a church")
        for m in (shared_model, *(runs[states][1].merged(shared_model) for states in ("frozen", "cached")))
    )
    assert (one - other).norm() < 0.05 * (one - before).norm()
    assert runs["cached"][2] < 0.5 * runs["frozen"][2]


# What is trained


def changed(edit):
    return {name.removeprefix("text_encoder.") for name, change in edit.tensors.items() if change.any()}


def test_only_the_chosen_layers_of_the_text_encoder_change(model):
    before = {n: p.clone() for m in (model.unet, model.text_encoder) for n, p in m.named_parameters()}
    _, whole = trained(model, SHORT)
    _, first = trained(model, replace(SHORT, layers=1))
    assert whole.kind == first.kind == "text_encoder"
    assert changed(first) <= set(text_parameters(model.text_encoder, 1))
    assert all("layers.0." in name for name in changed(first)) and changed(first)
    assert any("final_layer_norm" in name for name in changed(whole))
    assert not any("embedding" in name for name in changed(whole))
    for module in (model.unet, model.text_encoder):
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, before[name]) and parameter.grad is None and parameter.requires_grad


def test_clip_has_the_papers_85_million_parameters():
    with torch.device("meta"):
        config = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
        encoder = CLIPTextModel(config)
    count = lambda names: sum(encoder.get_parameter(name).numel() for name in names)
    assert count(text_parameters(encoder)) == 85_056_000
    with pytest.raises(ValueError, match="12 layers"):
        text_parameters(encoder, 13)
    numbers = lambda names: {int(name.partition("layers.")[2].partition(".")[0]) for name in names}
    chosen = lambda faithful: advunlearn.trained_names(
        encoder, replace(SHORT, states="frozen", layers=2, faithful=faithful)
    )
    assert numbers(chosen(False)) == {0, 1}
    assert numbers(chosen(True)) == {0, 1, 10, 11}  # the beginning of a name


def test_the_unet_variant_trains_the_unet(model):
    _, edit = trained(model, replace(SHORT, part="x"))
    assert edit.kind == "weight_delta" and all(".attn2." in name for name in edit.tensors)


# What is retained


def test_the_retain_set_never_names_what_is_erased(shared_model):
    erased = [Concept("hot dog", synonyms=("sandwich",))]
    names, prompts = retained(shared_model, erased, [], ("a photo of {}", "{} in ink style"))
    assert not {"hot dog", "dog", "sandwich"} & set(names) and len(names) == 77
    assert prompts[:2] == ["a photo of person", "bicycle in ink style"]
    _, with_null = retained(shared_model, erased, [], ("{}",), null=True)
    assert with_null[-1] == "" and len(with_null) == 78
    names, style = retained(shared_model, [Concept("ink")], [], ("a photo of {}", "{} in ink style"))
    assert len(names) == 80 and not any("ink" in prompt.split() for prompt in style)
    # what the caller names is kept, but for the erased concept itself
    keep = [Concept(name) for name in ("dog", "hot dog", "sandwich roll")]
    assert retained(shared_model, erased, keep, ("a {}",))[0] == ["dog", "sandwich roll"]
    # common words are nobody's
    assert len(retained(shared_model, [Concept("photo of a hat in style")], [], ("a photo of {}",))[0]) == 80
    with pytest.raises(ValueError, match="nothing is left to retain"):
        retained(shared_model, [Concept("ink")], [], ("{} in ink style",))


def test_similar_names_are_dropped(shared_model):
    erased, keep = [Concept("church")], [Concept(name) for name in KEEP]
    similarity = lambda limit: retained(shared_model, erased, keep, SHORT.retain_templates, similarity=limit)[
        0
    ]
    row = lambda name: torch.nn.functional.normalize(_sentence(shared_model, [name]), dim=1)[0]
    near = {name: float(row(name) @ row("church")) for name in KEEP}
    middle = sorted(near.values())[2]
    assert (
        set(similarity(middle)) == {name for name in KEEP if near[name] < middle} and similarity(1.0) == KEEP
    )
    with pytest.raises(ValueError, match="nothing is left to retain"):
        similarity(-1.0)


def test_without_a_list_the_world_or_coco_is_retained(shared_model):
    names, prompts = retained(shared_model, [Concept("dog")], [], ("a photo of {}",))
    assert len(COCO) == len(set(COCO)) == 80
    assert len(names) == 78 and "hot dog" not in names  # nor "dog"
    assert prompts[0] == "a photo of person"


def test_the_retain_set_is_gone_through_without_repeats():
    whole = [turn(step, 11, 3, 5).tolist() for step in range(6)]
    for start in (0, 3):  # three batches a pass, two rows left over
        rows = sum(whole[start : start + 3], [])
        assert len(set(rows)) == 9 and set(rows) <= set(range(11))
    assert whole[:3] != whole[3:]
    assert [turn(step, 11, 3, 5).tolist() for step in range(6)] == whole
    assert len(turn(0, 2, 5, 1)) == 5


# The edit


def test_the_text_encoder_is_plug_and_play(model, tmp_path):
    _, edit = trained(model, replace(SHORT, lr=1e-2))
    edit.save(tmp_path / "edit.safetensors")
    edit = ek.Edit.load(tmp_path / "edit.safetensors")
    folder = edit.to_text_encoder(tmp_path / "encoder", model=model)
    stock, info = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    merged = edit.merged(model)
    ids = torch.tensor(
        model.tokenizer(
            ["a church"], padding="max_length", max_length=model.tokenizer.model_max_length
        ).input_ids
    )
    assert torch.equal(stock(ids)[0], merged.encode("a church"))
    assert not torch.allclose(model.encode("a church"), merged.encode("a church"), atol=1e-3)

    # another UNet with the same text encoder takes it; another text encoder does not
    other = tiny_pipeline(seed=1)
    other.text_encoder = tiny_pipeline(seed=0).text_encoder
    other = models.load(other)
    plain = other.encode("a church")
    with edit.applied(other):
        assert torch.equal(other.encode("a church"), merged.encode("a church"))
    assert torch.equal(other.encode("a church"), plain)
    stranger = models.load(tiny_pipeline(seed=1))
    with pytest.raises(ValueError, match="that very text encoder"), edit.applied(stranger):
        pass
    with pytest.raises(ValueError, match="does not change the text encoder"):
        ek.uce.fit(model, "church").to_text_encoder(tmp_path / "no", model=model)
    with pytest.raises(ValueError, match="not in the text encoder"):
        ek.Edit("text_encoder", {"unet.conv_in.weight": torch.zeros(1)}, edit.metadata)


def test_text_encoder_edits_compose(model):
    _, one = trained(model, SHORT)
    _, two = trained(model, SHORT, erase="art", preserve=["dog", "house"])
    both = one.compose(two)
    assert both.kind == "text_encoder"
    name = next(iter(one.tensors))
    assert torch.equal(both.tensors[name], one.tensors[name] + two.tensors[name])


# Runs


def test_an_interrupted_training_goes_on(shared_model, tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.tuning.SAVE_EVERY", 2)
    config = replace(SHORT, iterations=6, start="latest", batch=1)
    whole, edit = trained(shared_model, config)

    class Killed(Exception):
        pass

    def stop(state):
        if state["step"] == 4:
            raise Killed

    with pytest.raises(Killed):
        advunlearn.fit(
            shared_model,
            "church",
            KEEP,
            config=config,
            generator=torch.Generator().manual_seed(0),
            callback=stop,
        )
    rest, resumed = trained(shared_model, config)
    assert of(rest, "loss") == of(whole, "loss")[4:] and resumed.digest == edit.digest


def test_same_seed_same_edit(shared_model):
    one, again, other = (trained(shared_model, SHORT, seed)[1].digest for seed in (0, 0, 1))
    assert one == again != other


def test_a_loss_that_is_not_finite_stops_the_training(model):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        trained(model, replace(SHORT, lr=1e30))
    assert all(p.isfinite().all() for p in model.text_encoder.parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"placement": "middle"}, "placement must be one of"),
        ({"rule": "fgsm"}, "rule must be one of"),
        ({"start": "warm"}, "start must be one of"),
        ({"states": "trained"}, "does not depend on the text encoder"),
        ({"part": "x", "layers": 2}, "layers are the text encoder's"),
        ({"k": 0}, "k must be at least 1"),
        ({"faithful": True, "states": "frozen", "rule": "gd"}, "no plain gradient descent"),
        ({"templates": ()}, "at least one template"),
        ({"gamma": -1.0}, "gamma must be at least 0"),
        ({"retain_templates": ("photo",)}, "exactly one"),
        ({"layers": 1.0}, "layers must be a whole number"),
        ({"noises": 1.5}, "noises must be a whole number"),
        ({"eta": float("inf")}, "eta must be a finite number"),
        ({"faithful": True, "states": "frozen", "sampler": 1}, "sampler must be at least 2"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_defaults_are_the_papers():
    default, nudity = advunlearn.Config(), advunlearn.PRESETS["sd14-nudity"]
    assert (default.iterations, default.lr, default.attack_steps, default.alpha) == (1000, 1e-5, 30, 1e-3)
    assert (default.gamma, nudity.gamma, default.retain_batch, default.k) == (0.5, 0.3, 5, 1)
    assert (default.placement, default.start, default.warmup, default.eta) == ("prefix", "random", 200, 1.0)
    fast = advunlearn.PRESETS["sd14-nudity-fast"]
    assert (fast.attack_steps, fast.rule) == (1, "sign")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("part", ["text", "x"])
def test_on_a_gpu(part):
    model = models.load(tiny_pipeline(), device="cuda", dtype="float16")
    seen, edit = trained(model, replace(SHORT, part=part))
    assert all(value == value for value in of(seen, "loss"))
    with edit.applied(model):
        model.generate("a church", steps=2)
