"""ESD: the target, where x_t comes from, what is trained, and training that resumes."""

import dataclasses

import pytest
import torch
from conftest import WIDTH, tiny_pipeline
from diffusers import EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel

import erasekit as ek
from erasekit import miniatures, models
from erasekit.layers import unet_parameters
from erasekit.methods import esd
from erasekit.states import STATE, Picks, State, States, cached, unusual
from erasekit.tuning import descend, difference, trainee

SHORT = esd.Config(
    iterations=4, lr=1e-3, batch=2, sampler=5, noises=2, states="cached", templates=("{}", "a {}")
)


def losses(model, config, seed=0, **more):
    """Loss at every update, and the edit."""
    seen = []
    edit = esd.fit(
        model, "church", config=config, generator=torch.Generator().manual_seed(seed),
        callback=lambda state: seen.append(state["loss"]), **more,
    )  # fmt: skip
    return seen, edit


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.states.FOLDER", tmp_path)
    return tmp_path


pytestmark = pytest.mark.usefixtures("there")


def states(model, **changes):
    given = dict(guidance=3.0, sampler=5, states="frozen", noises=3, faithful=False) | changes
    return States(model, ["church", "a dog", ""], 11, **given)


def every(of: States, prompt: int = 0, noise: int = 1) -> Picks:
    """All nodes of one way."""
    rows = lambda value: torch.full((of.sampler,), value)
    return Picks(rows(prompt), rows(noise), torch.arange(of.sampler), rows(7))


# The target


def test_the_target_leads_from_the_prompt_away(generator):
    draw = lambda: torch.randn(2, 4, 8, 8, generator=generator)
    state = State(draw(), torch.tensor([1, 2]), draw(), draw())
    assert torch.equal(state.target(0.0), state.uncond)
    assert torch.allclose(state.target(-1.0), state.text, atol=1e-6)
    middle = (state.target(1.0) + state.target(3.0)) / 2
    assert torch.allclose(state.target(2.0), middle, atol=1e-6)  # affine in eta
    assert not torch.allclose(state.target(1.0), state.uncond, atol=0.1)


def test_nothing_to_learn_where_the_target_is_the_prediction(shared_model):
    at_once, _ = losses(shared_model, dataclasses.replace(SHORT, eta=-1.0, iterations=1))
    control, _ = losses(shared_model, dataclasses.replace(SHORT, eta=1.0, iterations=1))
    assert at_once[0] < 1e-10 < 1e-3 < control[0]


# x_t


def test_states_are_points_of_the_stock_sampling_loop(shared_model):
    found = states(shared_model).at(every(states(shared_model)))
    pipe = shared_model.pipeline
    pipe.scheduler.set_timesteps(5)
    text, empty = shared_model.encode("church"), shared_model.encode("")
    x = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(11 + 1))
    for node, t in zip(reversed(range(5)), pipe.scheduler.timesteps, strict=True):
        with torch.no_grad():
            u, c = (pipe.unet(x, t, encoder_hidden_states=one).sample for one in (empty, text))
        assert found.timestep[node] == t
        assert torch.allclose(found.sample[node], x[0], atol=1e-5)
        assert torch.allclose(found.text[node], c[0], atol=1e-5)
        assert torch.allclose(found.uncond[node], u[0], atol=1e-5)
        x = pipe.scheduler.step(u + 3.0 * (c - u), t, x).prev_sample


def test_the_models_own_sampler_does_not_matter(shared_model):
    """Stable Diffusion 1.x comes with PNDM, which takes 51 steps for 50, and others rescale what the UNet sees."""
    wanted = states(shared_model).at(every(states(shared_model)))
    for kind in (PNDMScheduler, EulerDiscreteScheduler):
        pipeline = tiny_pipeline()
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        other = models.load(pipeline)
        for source in ("frozen", "cached"):
            found = states(other, states=source).at(every(states(other)))
            for name in STATE:
                assert torch.allclose(
                    getattr(found, name).float(), getattr(wanted, name).float(), atol=1e-4
                ), kind


def test_half_precision_learns_like_single_precision(shared_model):
    """bfloat16 arithmetic around weights in single precision: not with the first weights for ever."""
    config = dataclasses.replace(SHORT, iterations=40, batch=4, lr=3e-3)
    pipeline = tiny_pipeline()
    single, _ = losses(shared_model, config)
    half, edit = losses(models.load(pipeline.to(torch.bfloat16)), config)
    mean = lambda part: sum(part) / len(part)
    assert mean(single[-8:]) < 0.5 * mean(single[:8])
    assert mean(half[-8:]) < 0.6 * mean(half[:8])


def test_cached_states_are_drawn_once(shared_model, tmp_path, monkeypatch):
    picks = every(states(shared_model))
    first = states(shared_model, states="cached", folder=tmp_path).at(picks)
    monkeypatch.setattr("erasekit.states.walk", lambda *args, **kwargs: pytest.fail("drawn again"))
    again = states(shared_model, states="cached", folder=tmp_path).at(picks)
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in STATE)
    with pytest.raises(pytest.fail.Exception):  # other guidance, other states
        states(shared_model, states="cached", folder=tmp_path, guidance=4.0)


def resized(model):
    model.unet.register_to_config(sample_size=4)


def loaded_at_another_size(model):
    resized(model)
    model.unet.sample_size = 4


def without_zeros(model):
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=False)


def another_vector(model):
    with torch.no_grad():
        model.text_encoder.get_input_embeddings().weight[-1].add_(1.0)


@pytest.mark.parametrize(
    "family, change, prompt",
    [
        ("sd1", resized, "church"),
        ("sd1", loaded_at_another_size, "church"),
        ("sdxl", without_zeros, "church"),
        ("sd1", another_vector, "<toy>"),
    ],
)
def test_cached_states_are_those_of_the_model_as_it_is_now(family, change, prompt, tmp_path):
    """Where what changed is in no fingerprint; the control, an unchanged model, reads what is kept."""
    model = models.load(miniatures.pipeline(family))
    if prompt == "<toy>":
        model.pipeline.load_textual_inversion(torch.ones(WIDTH), token="<toy>")
    made = lambda place: States(model, [prompt], 1, 3.0, 2, "cached", 1, folder=tmp_path / place).table
    first, fingerprint = made("one"), model.fingerprint()
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    made("one")
    assert files == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    change(model)
    again, fresh = made("one"), made("other")
    assert models.load(model.pipeline).fingerprint() == fingerprint
    for name in STATE:
        assert torch.equal(again[name], fresh[name])
    assert not all(torch.equal(first[name], again[name]) for name in STATE)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_keys_of_models_as_they_were_loaded_have_nothing_added(family):
    pipeline = miniatures.pipeline(family)
    if family == "sdxl":
        pipeline.register_to_config(force_zeros_for_empty_prompt=True)  # the class's own
    assert unusual(models.load(pipeline)) == []


def test_a_training_at_another_size_is_another_edit_and_begins_anew(model, tmp_path, monkeypatch):
    """The control: at the first size again, it goes on."""
    monkeypatch.setattr("erasekit.tuning.SAVE_EVERY", 2)

    def stop(state):
        if state["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        esd.fit(model, "church", config=SHORT, generator=torch.Generator().manual_seed(0), callback=stop)
    resized(model)
    seen, edit = losses(model, SHORT)
    assert len(seen) == SHORT.iterations
    assert edit.digest == losses(model, SHORT, folder=tmp_path / "fresh")[1].digest
    model.unet.register_to_config(sample_size=8)
    rest, first = losses(model, SHORT)
    assert len(rest) == 2 and first.digest != edit.digest


def test_what_is_kept_survives_a_kill_and_shows_damage(shared_model, tmp_path, monkeypatch):
    """Rows made by pieces: finished ones are read, a damaged one is made again; other inputs have their own place."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # in order
    made = []

    def rows(part, until=None):
        if part.start == until:
            raise KeyboardInterrupt
        made.append(part.start)
        return {"x": torch.arange(part.start, part.stop).float(), "y": torch.ones(part.stop - part.start, 2)}

    keep = lambda what, make: cached(shared_model, tmp_path, what, 20, make)["x"].tolist()
    with pytest.raises(KeyboardInterrupt):
        keep(["a"], lambda part: rows(part, until=16))
    assert keep(["a"], rows) == list(range(20)) and made == [0, 8, 16]
    (first, *_) = sorted(tmp_path.rglob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-3] ^= 1
    first.write_bytes(content)
    assert keep(["a"], rows) == list(range(20)) and made == [0, 8, 16, 0]
    keep(["b"], rows)
    assert made == [0, 8, 16, 0, 0, 8, 16]


def test_the_empty_prompt_needs_one_half_of_guidance(shared_model, tmp_path, monkeypatch):
    """Where text and no text are the same, e = e_uncond + w (e_text - e_uncond) is e_uncond for every w."""
    rows, forward = [], shared_model.unet.forward
    counted = lambda x, *args, **kwargs: rows.append(len(x)) or forward(x, *args, **kwargs)
    monkeypatch.setattr(shared_model.unet, "forward", counted)
    given = (shared_model, [""], 11, 3.0, 5)
    kept, fresh = States(*given, "cached", 3, folder=tmp_path), States(*given, "frozen", 3)
    assert rows == [3] * 5  # the control: "frozen" draws with one half as well, and predicts both
    picks = Picks(*(torch.tensor(column) for column in ([0] * 4, [0, 1, 2, 0], [0, 2, 4, 3], [0] * 4)))
    one, other = kept.at(picks), fresh.at(picks)
    monkeypatch.setattr(States, "unguided", False)
    both = States(*given, "cached", 3, folder=tmp_path / "both").at(picks)
    for name in STATE:
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-5)
        assert torch.allclose(getattr(one, name), getattr(both, name), atol=1e-5)
    assert rows[-5:] == [6] * 5


def test_cached_and_new_states_are_the_same(shared_model):
    fresh, kept = states(shared_model), states(shared_model, states="cached")
    prompt = torch.tensor([0, 1, 2, 1, 0, 2])
    picks = fresh.pick(prompt, torch.Generator().manual_seed(5))
    a, b = fresh.at(picks), kept.at(picks)
    assert torch.equal(a.timestep, b.timestep)
    for name in ("sample", "text", "uncond"):
        assert torch.allclose(getattr(a, name), getattr(b, name), atol=1e-5), name
    other = kept.at(dataclasses.replace(picks, noise=(picks.noise + 1) % 3))
    assert not torch.allclose(a.sample, other.sample, atol=0.1)


def test_the_lag_of_the_code(shared_model, monkeypatch):
    """x_t at t = 20 (e - 2) + 1 for a UNet that is told 20 e + offset, after 50 - e calls (49 for e = 0)."""
    lagging, right = states(shared_model, faithful=True), states(shared_model)
    late, clean = lagging.at(every(lagging)), right.at(every(right))
    assert late.timestep.tolist() == [200 * e + 7 for e in range(5)]
    assert clean.timestep.tolist() == [200 * e + 1 for e in range(5)]
    # the first of its steps is left out, so the way is another one; both start from the same noise
    skipped = list(lagging._walk(torch.tensor([0]), torch.tensor([1]), 1))
    assert [step["timestep"] for step in skipped] == [601, 401, 201, 1]
    for node in (2, 3, 4):
        step = next(step for step in skipped if step["timestep"] == 200 * (node - 2) + 1)
        assert torch.allclose(late.sample[node], step["sample"][0], atol=1e-5)
    for node in (0, 1):
        assert torch.allclose(late.sample[node], skipped[-1]["latents"][0], atol=1e-5)

    calls = []
    forward = shared_model.unet.forward
    monkeypatch.setattr(
        shared_model.unet, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw)
    )
    for node, expected in enumerate([4, 4, 3, 2, 1]):
        calls.clear()
        one = lambda value: torch.tensor([value])
        lagging.at(Picks(one(0), one(0), one(node), one(0)))
        assert len(calls) == expected + 1  # and one for the targets


@pytest.mark.parametrize("source", ["trained", "frozen", "cached"])
def test_stable_diffusion_is_trained_to_the_bit_by_states(shared_model, source, tmp_path):
    """What other families need changes nothing here: losses and edit are those of this loop, bit for bit."""
    config = dataclasses.replace(SHORT, states=source)
    found, edit = losses(shared_model, config, seed=3)
    generator = torch.Generator().manual_seed(3)
    unet = trainee(shared_model.unet, unet_parameters(shared_model.unet, "x"))
    prompts = ["church", "a church"]
    points = States(
        shared_model, prompts, int(torch.randint(2**31, (), generator=generator)), 3.0, 5, source, 2,
        walker=unet if source == "trained" else None,
    )  # fmt: skip
    wanted = []

    def loss(step, generator):
        prompt = torch.randint(2, (config.batch,), generator=generator)
        state = points.at(points.pick(prompt, generator))
        text = points.text[prompt].rows
        out = unet(state.sample, state.timestep, encoder_hidden_states=text, return_dict=False)[0]
        wanted.append((out.float() - state.target(config.eta).float()).square().mean())
        return {"loss": wanted[-1]}

    descend("own", shared_model, unet, loss, config, prompts, generator, None, tmp_path / "own", False)
    assert found == [float(one.detach()) for one in wanted]
    for name, tensor in difference(unet, shared_model.unet, "unet").items():
        assert torch.equal(edit.tensors[name], tensor)
    assert losses(shared_model, config, seed=4)[0] != found  # control


def test_erased_from_itself_is_plain_esd(shared_model):
    (plain, _), (itself, _), (other, edit) = (
        losses(shared_model, SHORT, seed=3, **kwargs)
        for kwargs in ({}, {"anchor": "church"}, {"anchor": "house"})
    )
    assert edit.metadata["concepts"] == {"erase": ["church"], "anchor": ["house"], "preserve": []}
    assert itself == pytest.approx(plain, rel=1e-4)
    assert other != pytest.approx(plain, rel=1e-2)  # control


# What is trained


def test_parameter_sets_have_the_sizes_of_the_sheet():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    sizes = {name: parameter.numel() for name, parameter in unet.named_parameters()}
    of = lambda which: sum(sizes[name] for name in unet_parameters(unet, which))
    assert sum(sizes.values()) == of("full") == 859_520_964
    assert (of("x"), of("x-strict"), of("u")) == (43_962_560, 19_169_280, 813_496_320)
    with pytest.raises(ValueError, match="must be one of"):
        unet_parameters(unet, "esd-x")


@pytest.mark.parametrize("which", ["x", "x-strict", "u", "self", "full"])
def test_only_the_chosen_parameters_change_and_the_model_never(model, which):
    before = {name: p.clone() for name, p in model.unet.named_parameters()}
    _, edit = losses(model, dataclasses.replace(SHORT, parameters=which))
    for name, parameter in model.unet.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None and parameter.requires_grad
    chosen = {f"unet.{name}" for name in unet_parameters(model.unet, which)}
    assert edit.kind == "weight_delta" and set(edit.tensors) == chosen
    # a key's bias-free softmax leaves a few directions without gradient, whole tensors not
    assert sum(bool(t.any()) for t in edit.tensors.values()) > 0.9 * len(chosen)
    with edit.applied(model):
        assert any(not torch.equal(p, before[name]) for name, p in model.unet.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.unet.named_parameters())


def test_training_comes_nearer_to_the_target(shared_model):
    config = dataclasses.replace(SHORT, iterations=60, batch=4, lr=3e-3)
    _, edit = losses(shared_model, config)
    points = states(shared_model, noises=8)
    here = Picks(torch.zeros(16, dtype=int), torch.arange(16) % 8, torch.arange(16) % 5, torch.zeros(16))
    state = points.at(here)
    text = points.text[here.prompt].rows

    def error():
        with torch.no_grad():
            out = shared_model.unet(state.sample, state.timestep, encoder_hidden_states=text).sample
        return float((out - state.target(config.eta)).square().mean())

    before = error()
    with edit.applied(shared_model):
        assert error() < 0.5 * before


# Runs


def test_an_interrupted_training_goes_on(shared_model, tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.tuning.SAVE_EVERY", 2)
    config = dataclasses.replace(SHORT, iterations=6)
    whole, edit = losses(shared_model, config, folder=tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("esd-*"))  # no checkpoint outlives its use

    class Killed(Exception):
        pass

    def stop(state):
        if state["step"] == 4:
            raise Killed

    start = lambda: torch.Generator().manual_seed(0)
    with pytest.raises(Killed):
        esd.fit(
            shared_model, "church", config=config, generator=start(), callback=stop, folder=tmp_path / "again"
        )
    rest, resumed = losses(shared_model, config, folder=tmp_path / "again")
    assert rest == whole[4:] and resumed.digest == edit.digest


def test_same_seed_same_edit(shared_model):
    edits = [losses(shared_model, SHORT, seed)[1].digest for seed in (0, 0, 1)]
    assert edits[0] == edits[1] != edits[2]


def test_a_loss_that_is_not_finite_stops_the_training(model, there):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        losses(model, dataclasses.replace(SHORT, lr=1e30))
    assert not model._active and all(p.isfinite().all() for p in model.unet.parameters())


def test_saved_edit_and_lora(model, tmp_path):
    _, edit = losses(model, dataclasses.replace(SHORT, parameters="x-strict", lr=1e-2))
    edit.save(tmp_path / "esd.safetensors")
    again = ek.Edit.load(tmp_path / "esd.safetensors")
    draw = lambda: model.generate("a church", seeds=[3], steps=3)[0].tobytes()
    plain = draw()
    with again.applied(model):
        edited = draw()
    assert edited != plain == draw()
    assert edit.merged(model).generate("a church", seeds=[3], steps=3)[0].tobytes() == edited
    assert edit.to_lora(tmp_path / "lora", model=model).exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"states": "live"}, "states must be one of"),
        ({"states": "cached", "noises": None}, "say how many"),
        ({"states": "cached", "faithful": True}, "not in the cache"),
        ({"states": "cached", "guidance": 1.0}, "guidance above 1"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"noises": 0}, "noises must be at least 1"),
        ({"noises": 1.5}, "noises must be a whole number"),
        ({"eta": float("nan")}, "eta must be a finite number"),
        ({"states": "frozen", "faithful": True, "sampler": 1}, "sampler must be at least 2"),
        ({"templates": ("church",)}, "exactly one"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_bad_calls(shared_model):
    with pytest.raises(ValueError, match="nothing to erase"):
        esd.fit(shared_model, [], config=SHORT)
    with pytest.raises(ValueError, match="must be one of"):
        esd.fit(shared_model, "church", config=dataclasses.replace(SHORT, parameters="v"))
    for given, name in (("sd14-object", "sd14-object"), ("sd15", "emoji"), (ek.uce.Config(), "emoji")):
        with pytest.raises(ValueError, match=rf"such as PRESETS\['{name}'\]"):
            esd.fit(shared_model, "church", config=given)


def test_checkpoints_of_edited_and_unedited_models_are_apart(shared_model, tmp_path, monkeypatch):
    monkeypatch.setattr("erasekit.tuning.SAVE_EVERY", 2)

    def stop(state):
        if state["step"] == 3:
            raise KeyboardInterrupt

    edited = ek.uce.fit(shared_model, "dog").merged(shared_model)
    with pytest.raises(KeyboardInterrupt):
        esd.fit(edited, "church", config=SHORT, generator=torch.Generator().manual_seed(0), callback=stop)
    assert len(losses(shared_model, SHORT)[0]) == SHORT.iterations


def test_presets_are_the_settings_of_the_code():
    assert esd.Config() == esd.PRESETS["sd14-artist"]
    default, new = esd.Config(), esd.PRESETS["sd14-2025"]
    assert (default.eta, default.guidance, default.iterations, default.lr, default.sampler) == (
        1,
        3,
        1000,
        1e-5,
        50,
    )
    assert (new.lr, new.iterations, new.states) == (5e-5, 200, "frozen")  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    model = models.load(tiny_pipeline(), device="cuda", dtype="float16")
    seen, edit = losses(model, SHORT)
    assert all(value == value for value in seen) and edit.tensors
    with edit.applied(model):
        model.generate("a church", steps=2)
