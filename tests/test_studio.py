"""The studio: one drawing kept step by step, its figure, its panel by the widget objects, and in a real browser."""

import asyncio
import base64
import io
import sys
import threading
from contextlib import nullcontext

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import nbformat  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from browsing import IDLE, RUN, browser, enter, field, lab, until  # noqa: E402, F401
from conftest import tiny_pipeline  # noqa: E402
from nbformat.v4 import new_code_cell, new_notebook  # noqa: E402
from PIL import Image  # noqa: E402

import erasekit as ek  # noqa: E402
from erasekit import drawings, miniatures, sampling  # noqa: E402
from erasekit.drawings import averaged, estimated, heat, token_of, verdicts, watch  # noqa: E402
from erasekit.layers import cross_attention, first_attention  # noqa: E402
from erasekit.studio import LIVE, enlarged  # noqa: E402
from erasekit.widgets import studio  # noqa: E402

HOW = {"steps": 3, "guidance": 3.0}
SIDE = (
    192  # screen pixels of the tiny pictures (12 times their 16) and of the emoji model's (3 times their 64)
)


@pytest.fixture(scope="module")
def tiny() -> ek.DiffusionModel:
    return ek.load(tiny_pipeline())


@pytest.fixture(scope="module")
def edit(tiny) -> ek.Edit:
    return ek.uce.fit(tiny, "dog", ["castle"])


def shown(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def large(picture) -> np.ndarray:
    return shown(enlarged(picture, SIDE))


def alike(some, others) -> bool:
    return len(some) == len(others) and all(map(np.array_equal, some, others))


class Controls:
    """A panel by what is written beside its controls, and what there is to see."""

    def __init__(self, panel):
        waiting, self.widgets = [panel], []
        while waiting:
            self.widgets.append(one := waiting.pop(0))
            waiting[:0] = getattr(one, "children", ())  # in the order in which they are seen
        (self.sheet,) = (one for one in self.widgets if type(one).__name__ == "GridBox")

    def __getitem__(self, description):
        (found,) = (one for one in self.widgets if getattr(one, "description", None) == description)
        return found

    def column(self, number: int) -> list[np.ndarray]:
        """What is visible of the pictures (0), the estimates (1), the maps (2), and belongs to the settings."""
        if self.sheet.layout.display == "none" or "erasekit-stale" in self.sheet._dom_classes:
            return []
        images = [one for one in self.sheet.children if type(one).__name__ == "Image"]
        return [shown(one.value) for one in images[number::3] if one.layout.display != "none"]

    @property
    def pictures(self) -> list[np.ndarray]:
        return self.column(0)

    @property
    def text(self) -> str:
        """Of what is not hidden."""
        hidden = self.sheet.children if self.sheet.layout.display == "none" else ()
        texts = [one for one in self.widgets if type(one).__name__ == "HTML" and one not in hidden]
        return " ".join(one.value for one in texts if one.layout.display != "none")


# One drawing


@pytest.mark.parametrize("edited, strength", [(False, 1.0), (True, 1.0), (True, 0.5)])
def test_watching_changes_nothing(tiny, edit, edited, strength):
    used = edit if edited else None
    before = {name: one.processor for name, one in cross_attention(tiny.unet).items()}
    way = watch(tiny, used, "a dog", 4, strength=strength, **HOW)
    assert {name: one.processor for name, one in cross_attention(tiny.unet).items()} == before
    if edited:
        with edit.applied(tiny, scale=strength):
            (picture,) = tiny.generate(["a dog"], [4], **HOW)
    else:
        (picture,) = tiny.generate(["a dog"], [4], **HOW)
    assert np.array_equal(way.picture, picture) and len(way.estimates) == HOW["steps"]
    assert way.tokens[0] == "start" and way.tokens[-1] == "end" and way.tokens[-2] == "dog"


def test_recording_leaves_what_the_unet_computes_bit_for_bit(tiny):
    x, text = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), tiny.encode(["a dog", ""])
    with torch.no_grad():
        plain = tiny.unet(x, 500, encoder_hidden_states=text).sample
        with first_attention(tiny.unet) as seen:
            recorded = tiny.unet(x, 500, encoder_hidden_states=text).sample
    assert torch.equal(plain, recorded) and seen.keys() == cross_attention(tiny.unet).keys()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_estimate_is_the_schedulers_own(prediction):
    model = ek.load(tiny_pipeline())
    ddim = sampling.ddim(model.scheduler)
    ddim.register_to_config(prediction_type=prediction)
    model.pipeline.scheduler = ddim
    own, ours = [], []

    def compare(state):
        own.append(estimated(model, state, 3.0))
        ours.append(estimated(model, {**state, "pred_x0": None}, 3.0))

    model.generate(["a dog"], [0], 4, 3.0, callback=compare)
    assert len(own) == 4 and all(torch.allclose(a, b, atol=1e-4) for a, b in zip(own, ours, strict=True))


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_the_last_estimate_is_the_pictures_own(sampler):
    """What the last prediction stands for; of DPM-Solver, whose last step goes all the way, the picture itself."""
    import diffusers

    model = ek.load(tiny_pipeline())
    model.pipeline.scheduler = sampling.switched(model.scheduler, getattr(diffusers, sampler))
    way, states = watch(model, None, "a dog", 4, **HOW), []
    model.generate(["a dog"], [4], **HOW, callback=states.append)
    x, said = states[-1]["sample"], states[-1]["uncond"] + 3 * (states[-1]["text"] - states[-1]["uncond"])
    share = model.scheduler.alphas_cumprod[states[-1]["timestep"]]
    (wanted,) = model.decode((x - (1 - share).sqrt() * said) / share.sqrt())
    apart = lambda one, other: np.abs(np.asarray(one, int) - np.asarray(other, int)).max()
    assert apart(way.estimates[-1], wanted) <= 1, "one of 256 levels, by rounding in another batch"
    assert apart(way.estimates[0], wanted) > 1, "control"
    assert (apart(way.estimates[-1], way.picture) <= 1) == (sampler != "DDIMScheduler")


def by_hand(model, edit, prompt: str, step: int, scale: float = 1.0) -> torch.Tensor:
    """(tokens, height, width): softmax of query and key of each layer in a plain pass at x_t, resized and averaged."""
    states, inputs = [], {}
    with ek.edits.applied(edit, model, scale):
        model.generate([prompt], [0], **HOW, callback=states.append)

        def hook(name):
            return lambda module, args, kwargs: inputs.__setitem__(
                name, (args[0], kwargs["encoder_hidden_states"])
            )

        layers = cross_attention(model.unet)
        hooks = [one.register_forward_pre_hook(hook(n), with_kwargs=True) for n, one in layers.items()]
        with torch.no_grad():
            model.unet.forward(
                states[step]["sample"], states[step]["timestep"], encoder_hidden_states=model.encode([prompt])
            )
        for one in hooks:
            one.remove()
        found = []
        for name, (x, text) in inputs.items():
            layer = layers[name]
            split = lambda rows, n=layer.heads: rows[0].unflatten(-1, (n, -1)).transpose(0, 1)
            scores = split(layer.to_q(x)) @ split(layer.to_k(text)).transpose(1, 2) * layer.scale
            share = scores.softmax(-1)
            assert torch.allclose(share.sum(-1), torch.ones(share.shape[:2]), atol=1e-5), "rows sum to 1"
            side = round(share.shape[1] ** 0.5)
            grid = share.mean(0).T.unflatten(1, (side, side))
            found.append(torch.nn.functional.interpolate(grid[None], (8, 8), mode="bilinear")[0])
    assert len(found) == len(layers) > 1
    return torch.stack(found).mean(0).detach()


@pytest.mark.parametrize("method", [None, "uce", "adavd", "semantic_surgery", "sld"])
def test_maps_are_those_of_a_plain_pass_of_the_prompt(tiny, method):
    """Also under filters: SLD asks the UNet for other texts in the same step, whose maps are not these."""
    used = method and ek.methods.METHODS[method].fit(tiny, "dog")
    way = watch(tiny, used, "a church in ink style", 0, **HOW)
    assert way.maps.shape == (HOW["steps"], len(way.tokens), 8, 8)
    for step in (0, 1):
        wanted = by_hand(tiny, used, "a church in ink style", step)
        assert torch.allclose(wanted.sum(0), torch.ones(8, 8), atol=1e-5)
        assert torch.allclose(way.maps[step], wanted[: len(way.tokens)], atol=1e-5)
    assert not torch.allclose(way.maps[0], way.maps[1], atol=1e-4), "control: the steps are told apart"


def test_shares_of_all_tokens_add_up_to_one(tiny):
    with torch.no_grad(), first_attention(tiny.unet) as seen:
        tiny.unet(torch.randn(1, 4, 8, 8), 500, encoder_hidden_states=tiny.encode(["a dog"]))
    assert all(torch.allclose(one.sum(-1), torch.ones(one.shape[:-1]), atol=1e-5) for one in seen.values())
    assert torch.allclose(averaged(seen, (8, 8)).sum(0), torch.ones(8, 8), atol=1e-5)


def test_first_attention_keeps_the_first_call_after_each_clear(tiny):
    x, calls = torch.randn(1, 4, 8, 8), []
    with torch.no_grad(), first_attention(tiny.unet) as seen:
        for prompt in ("a dog", "a church", "a castle"):
            tiny.unet(x, 500, encoder_hidden_states=tiny.encode([prompt]))
            calls.append(dict(seen))
            if prompt == "a church":
                seen.clear()
    name = next(iter(calls[0]))
    assert calls[0][name] is calls[1][name] and not torch.equal(calls[1][name], calls[2][name])


def test_an_attack_adds_the_concepts_direction(tiny, edit):
    way = watch(tiny, edit, "a castle", 3, attack=("dog", 2.0), **HOW)
    with edit.applied(tiny):
        moved = tiny.encode("a castle") + 2 * (tiny.encode("a dog") - tiny.encode("a thing"))
        (wanted,) = tiny.draw(moved, [3], **HOW)
    assert np.array_equal(way.picture, wanted)
    assert not np.array_equal(wanted, watch(tiny, edit, "a castle", 3, **HOW).picture), "control"
    nothing = watch(tiny, edit, "a castle", 3, attack=("dog", 0.0), **HOW)
    assert np.array_equal(nothing.picture, watch(tiny, edit, "a castle", 3, **HOW).picture)


def test_nothing_is_drawn_inside_an_edit(tiny, edit):
    with edit.applied(tiny), pytest.raises(ValueError, match="leave its `with` block"):
        watch(tiny, None, "a dog", 0, **HOW)


def test_the_token_of_a_concept():
    tokens = ("start", "a", "sea", "horse", "in", "ink", "end")
    assert [token_of(tokens, one) for one in ("sea horse", "ink", "Horse", "seahorse", "dog")] == [
        3,
        5,
        3,
        3,
        5,
    ]


def test_colors_go_from_nothing_to_the_top():
    seen = np.asarray(heat(torch.tensor([[0.0, 0.1, 0.2]]), 0.2)).sum(-1)[0]
    assert seen[0] < 10 < seen[1] < 600 < seen[2]
    assert np.asarray(heat(torch.zeros(2, 2), 0.0)).max() < 10


def test_the_judge_may_see_nothing(monkeypatch):
    records = [{"dog": 0.9, "cat": 0.1}, {"dog": 0.2, "cat": 0.3}]
    monkeypatch.setattr(drawings, "checked", lambda judge, pictures, prompts: records)
    model = type("World", (), {"everything": ("dog", "cat")})()
    assert verdicts(model, [None, None]) == ["dog 0.90", "none (cat 0.30)"]


def test_a_model_without_a_world_has_no_judge(tiny):
    assert verdicts(tiny, [None, None]) == ["", ""]


# Without widgets


def test_the_figure_shows_both_ways(tiny, edit, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # importing it would now fail
    fig = studio(tiny, "dog", preserve=["castle"], interactive=False, steps=7)
    assert len(fig.axes) == 4 * 5 and not plt.get_fignums()
    ways = [watch(tiny, one, "a dog", 0, steps=7) for one in (None, edit)]
    at, token = (0, 2, 4, 6), ways[0].tokens.index("dog")
    top = max(float(way.maps[:, token].max()) for way in ways)
    for number, way in enumerate(ways):
        above, below = (fig.axes[5 * row : 5 * row + 5] for row in (2 * number, 2 * number + 1))
        wanted = [*(way.estimates[step] for step in at), way.picture]
        assert alike([ax.images[0].get_array() for ax in above], [np.asarray(one) for one in wanted])
        maps = [np.asarray(heat(way.maps[step, token], top)) for step in at]
        assert alike([ax.images[0].get_array() for ax in below[:4]], maps) and not below[4].images
    assert [ax.get_title() for ax in fig.axes[:5]] == [
        *(f"estimate at step\n{step + 1} of 7" for step in at), "the picture",
    ]  # fmt: skip
    assert "attention to" in fig.axes[5].get_ylabel() and "After UCE" in fig.axes[10].get_ylabel()


def test_the_figure_shows_an_attack_in_rows_of_its_own(tiny, edit):
    fig = studio(tiny, "dog", preserve=["castle"], eta=2, interactive=False, **HOW)
    way = watch(tiny, edit, "a dog", 0, attack=("dog", 2.0), **HOW)
    columns = HOW["steps"] + 1
    assert len(fig.axes) == 6 * columns
    assert np.array_equal(fig.axes[5 * columns - 1].images[0].get_array(), np.asarray(way.picture))


def test_the_figure_of_a_world_has_the_judges_view():
    model = ek.load("emoji")
    fig = studio(model, "dog", preserve=["cat"], prompt="a dog in flat style", interactive=False, steps=6)
    way = watch(model, None, "a dog in flat style", 0, steps=6)
    assert fig.axes[4].get_xlabel() == verdicts(model, [way.picture])[0]
    assert fig.axes[4].get_xlabel().startswith("dog 0.") and "none" in fig.axes[14].get_xlabel()


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "say which concept"),
        ({"concept": "dog", "method": "esd"}, "method must be one of uce"),
        ({"concept": "dog", "edits": {"mine": "dog.safetensors"}}, r"edits\['mine'\] is a str"),
        ({"concept": " "}, "a concept needs a name"),
    ],
)
def test_what_cannot_be_shown_is_refused(tiny, interactive, given, message):
    with pytest.raises(ValueError, match=message):
        studio(tiny, interactive=interactive, **HOW, **given)


@pytest.mark.parametrize("preserve", ["castle", ["castle"], ("castle", "house")])
def test_what_is_preserved_is_a_name_or_several(tiny, preserve, monkeypatch):
    kept, fit = [], ek.uce.fit
    monkeypatch.setattr(ek.uce, "fit", lambda *given: kept.append(given[2]) or fit(*given))
    studio(tiny, "dog", preserve=preserve, interactive=False, **HOW)
    assert kept == [["castle"] if isinstance(preserve, str) else list(preserve)]


def test_other_models_labels_and_families_are_refused(tiny, edit):
    with pytest.raises(ValueError, match=r"edits\['mine'\].*was made for the model"):
        studio(ek.load(tiny_pipeline(seed=1)), "dog", edits={"mine": edit}, interactive=False)
    with pytest.raises(ValueError, match="another label"):
        studio(tiny, "dog", edits={"uce": edit}, interactive=False)
    with pytest.raises(ValueError, match="explore"):
        studio(ek.load(miniatures.sdxl()), "dog", interactive=False)
    with pytest.raises(ValueError, match="load"):
        studio(tiny.pipeline, "dog", interactive=False)


# The panel, by its widgets


@pytest.fixture
def panel(tiny, edit) -> Controls:
    return Controls(studio(tiny, "dog", preserve=["castle"], edits={"mine": edit}, **HOW))


def test_the_slider_goes_through_what_was_drawn_once(tiny, edit, panel, monkeypatch):
    ways = [watch(tiny, one, "a dog", 0, **HOW) for one in (None, edit)]
    for name in ("generate", "draw", "decode"):
        monkeypatch.setattr(tiny, name, None)  # drawing would now fail
    assert panel["Step"].max == panel["Step"].value == HOW["steps"]
    assert ways[0].tokens[panel["Token"].value] == "dog"
    for step in (3, 1, 2):
        panel["Step"].value = step
        for token in (panel["Token"].value, 0):
            panel["Token"].value = token
            top = max(float(way.maps[:, token].max()) for way in ways)
            assert alike(panel.pictures, [large(way.picture) for way in ways])
            assert alike(panel.column(1), [large(way.estimates[step - 1]) for way in ways])
            assert alike(panel.column(2), [large(heat(way.maps[step - 1, token], top)) for way in ways])
        assert f"step {step} of 3" in panel.text and "attention to <b>start" in panel.text


def test_every_control_changes_the_picture_as_the_model_says(tiny, panel):
    last = lambda used, prompt, seed, strength=1.0: large(
        watch(tiny, used, prompt, seed, strength=strength, **HOW).picture
    )
    fit = lambda of, about, kept: ek.methods.METHODS[of].fit(tiny, about, kept)
    for control, value, wanted in [
        ("Strength", 0.5, lambda: (fit("uce", "dog", ["castle"]), "a dog", 0, 0.5)),
        ("Strength", 1.0, lambda: (fit("uce", "dog", ["castle"]), "a dog", 0)),
        ("Method", "rece", lambda: (fit("rece", "dog", ["castle"]), "a dog", 0)),
        ("Preserve", "castle, house", lambda: (fit("rece", "dog", ["castle", "house"]), "a dog", 0)),
        ("Concept", "church", lambda: (fit("rece", "church", ["castle", "house"]), "a dog", 0)),
        ("Prompt", "a church", lambda: (fit("rece", "church", ["castle", "house"]), "a church", 0)),
        ("Seed", 5, lambda: (fit("rece", "church", ["castle", "house"]), "a church", 5)),
        ("Method", "mine", lambda: (fit("uce", "dog", ["castle"]), "a church", 5)),
        ("Method", "no edit", lambda: (None, "a church", 5)),
    ]:
        panel[control].value = value
        assert alike(panel.pictures, [last(None, *wanted()[1:3]), last(*wanted())]), (control, value)
    assert np.array_equal(*panel.pictures) and panel["Strength"].disabled and panel["Preserve"].disabled


def test_an_attack_is_a_row_of_its_own(tiny, edit, panel):
    two = panel.pictures
    panel["Attack"].value = 2.0
    attacked = watch(tiny, edit, "a dog", 0, attack=("dog", 2.0), **HOW)
    assert alike(panel.pictures, [*two, large(attacked.picture)]) and "Attacked" in panel.text
    panel["Attack"].value = 0.0
    assert alike(panel.pictures, two) and "Attacked" not in panel.text


def test_what_was_fitted_and_drawn_is_kept(tiny, panel, monkeypatch):
    fits, fit = [], ek.rece.fit
    monkeypatch.setattr(ek.rece, "fit", lambda *given, **more: fits.append(given[1:]) or fit(*given, **more))
    first = panel.pictures
    panel["Method"].value = "rece"
    second = panel.pictures
    assert not alike(first, second) and fits == [("dog", ["castle"])]
    monkeypatch.setattr(tiny, "generate", None)  # drawing would now fail
    for value, wanted in (("uce", first), ("rece", second)):
        panel["Method"].value = value
        assert alike(panel.pictures, wanted)
    assert len(fits) == 1
    panel["Preserve"].value = " castle ,, "
    assert alike(panel.pictures, second), "the same list, written otherwise"
    monkeypatch.undo()
    panel["Preserve"].value = "house"
    assert len(panel.pictures) == 2 and not alike(panel.pictures, second)


def test_every_live_method_is_drawn_with_its_maps(panel):
    for name in LIVE:
        panel["Method"].value = name
        assert len(panel.pictures) == len(panel.column(2)) == 2, (name, panel.text)
        assert ("what it brings there" in panel.text) == (name == "adavd")


def test_maps_that_could_not_be_recorded_are_said_to_be_missing(tiny, monkeypatch):
    monkeypatch.setattr(drawings, "first_attention", lambda unet: nullcontext({}))
    panel = Controls(studio(tiny, "dog", **HOW))
    assert len(panel.pictures) == 2 and not panel.column(2) and "could not be recorded" in panel.text
    fig = studio(tiny, "dog", interactive=False, **HOW)
    assert "could not be recorded" in fig.axes[4].get_title("left")


def test_bad_input_is_said_in_the_panel(panel):
    pictures = panel.pictures
    for control, bad, said in [
        ("Prompt", " ", "a prompt must be text"),
        ("Prompt", "dog " * 30, "the limit is 22"),
        ("Preserve", "dog", "cannot be both erased and preserved"),
        ("Concept", "", "a concept needs a name"),
    ]:
        good, panel[control].value = panel[control].value, bad
        assert (
            not panel.pictures
            and said in panel.text
            and "step" not in panel.text.lower().split("step moves")[0]
        )
        panel[control].value = good
        assert alike(panel.pictures, pictures) and said not in panel.text


def test_a_world_offers_its_names_and_a_style_can_be_erased():
    model = ek.load("emoji")
    panel = Controls(studio(model, "noto", prompt="a dog in noto style", steps=2, on_change=False))
    assert type(panel["Concept"]).__name__ == "Dropdown"
    assert {"dog", "church", "noto"} <= set(panel["Concept"].options) and panel["Concept"].value == "noto"
    panel["Preserve"].value = "horze"
    panel["Draw"].click()
    assert "unknown concept &#x27;horze&#x27;: did you mean" in panel.text
    with pytest.raises(ValueError, match="unknown concept 'dgo'"):
        studio(model, "dgo")


def test_text_is_shown_as_text(tiny, edit):
    panel = Controls(
        studio(tiny, "dog", edits={"<i>a</i>": edit}, method="<i>a</i>", prompt="dog <b>", **HOW)
    )
    assert "&lt;i&gt;a" in panel.text and "dog &lt;b&gt;" in panel.text and "<i>" not in panel.text


def test_with_a_button_nothing_is_drawn_before_it_is_pressed(tiny):
    panel = Controls(studio(tiny, "dog", on_change=False, **HOW))
    assert not panel.pictures and "Press Draw" in panel.text
    panel["Draw"].click()
    assert len(panel.pictures) == 2
    panel["Seed"].value = 4
    assert not panel.pictures and "Press Draw" in panel.text, "old pictures must not pass for new ones"


def test_a_kernel_draws_between_cells_and_only_the_last_settings(tiny, edit, monkeypatch):
    """A front end may set widgets from another thread while a cell runs."""
    seeds, generate = [], tiny.generate
    monkeypatch.setattr(tiny, "generate", lambda p, s, *a, **k: seeds.extend(s) or generate(p, s, *a, **k))

    async def cells():
        panel = Controls(studio(tiny, "dog", preserve=["castle"], seed=3, **HOW))
        assert not seeds, "the cell that makes the panel is still running"
        await asyncio.sleep(0)
        assert len(panel.pictures) == 2
        with edit.applied(tiny):  # a cell that uses the model
            for value in (4, 5, 6):
                other = threading.Thread(target=setattr, args=(panel["Seed"], "value", value))
                other.start()
                other.join()
            assert not panel.pictures and "drawing" in panel.text
        await asyncio.sleep(0)
        assert alike(
            panel.pictures, [large(watch(tiny, one, "a dog", 6, **HOW).picture) for one in (None, edit)]
        )

    asyncio.run(cells())
    assert set(seeds) == {3, 6}


def test_looking_leaves_the_model_as_it_was(tiny, panel):
    before = {name: one.clone() for name, one in tiny.unet.state_dict().items()}
    for name in LIVE:
        panel["Method"].value = name
    assert all(torch.equal(one, before[name]) for name, one in tiny.unet.state_dict().items())
    assert not tiny._active and not tiny._filtered


# In JupyterLab

NOTEBOOK = (
    """
import erasekit as ek
from erasekit.widgets import live, studio
model = ek.load("emoji")
""",
    """
studio(model, "dog", preserve=["cat"], prompt="a dog in flat style", steps=6, interactive=live())
""",
)
READ = """
const done = arguments[0];
Promise.all([...document.querySelectorAll(".widget-image")].map(async (image) => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    const size = image.getBoundingClientRect();
    return {
        png: btoa(String.fromCharCode(...bytes)),
        size: [size.width, size.height],
        left: size.left,
        top: size.top,
        right: size.right,
        clear: getComputedStyle(image).opacity === "1",
    };
})).then(done, () => done([]));
"""


@pytest.mark.browser
@pytest.mark.slow
def test_the_studio_in_jupyterlab(lab, browser):  # noqa: F811
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    model = ek.load("emoji")
    folder, address = lab
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [new_code_cell(source.strip()) for source in NOTEBOOK]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "studio.ipynb")

    def wait_for(used, prompt, at=-1, attack=None):
        """Until the page shows pictures and estimates of these, and no others."""
        ways = [watch(model, one, prompt, 0, steps=6) for one in (None, used)]
        ways += [watch(model, used, prompt, 0, steps=6, attack=attack)] if attack else []
        wanted = [large(one) for way in ways for one in (way.picture, way.estimates[at])]

        def there():
            found = [one for one in browser.execute_async_script(READ) if one["size"][0]]
            if not all(one["png"] for one in found):
                return False  # on their way
            seen = [shown(base64.b64decode(one["png"])) for i, one in enumerate(found) if i % 3 < 2]
            return alike(seen, wanted) and all(one["clear"] for one in found) and found

        try:
            found = until(there, f"{prompt} at {at}", 90)
        finally:
            browser.save_screenshot(str(folder / "last.png"))
        for one in found:
            assert one["size"] == [SIDE, SIDE], "a whole multiple of each picture's pixels"
            assert one["right"] < browser.execute_script("return innerWidth"), "nothing is cut off"
        for row in (found[i : i + 3] for i in range(0, len(found), 3)):
            assert len({one["top"] for one in row}) == 1, "side by side"
            assert row[0]["left"] < row[1]["left"] < row[2]["left"]
        return wanted

    browser.set_window_size(1280, 1300)
    browser.get(address.format("studio.ipynb"))
    until(lambda: browser.execute_script(IDLE), "a kernel")
    browser.execute_script(RUN, 0)
    browser.execute_script(RUN, 1)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, ".widget-image"), "the panel")
    uce, rece = (one.fit(model, "dog", ["cat"]) for one in (ek.uce, ek.rece))
    first = wait_for(uce, "a dog in flat style")
    browser.find_elements(By.CSS_SELECTOR, ".noUi-handle")[-1].send_keys(*[Keys.ARROW_LEFT] * 3)
    scrubbed = wait_for(uce, "a dog in flat style", at=2)
    assert not np.array_equal(first[1], scrubbed[1]) and np.array_equal(first[0], scrubbed[0])
    Select(field(browser, "Method", "select")).select_by_visible_text("RECE")
    by_rece = wait_for(rece, "a dog in flat style", at=2)
    assert not np.array_equal(by_rece[2], scrubbed[2]) and np.array_equal(by_rece[0], scrubbed[0])
    Select(field(browser, "Concept", "select")).select_by_visible_text("church")
    enter(browser, "Prompt", "a church in noto style")
    rece = ek.rece.fit(model, "church", ["cat"])
    wait_for(rece, "a church in noto style", at=2)
    Select(field(browser, "Attack", "select")).select_by_visible_text("concept vector × 2")
    wait_for(rece, "a church in noto style", at=2, attack=("church", 2.0))

    enter(browser, "Preserve", "horze")
    message = "//*[contains(text(), 'unknown concept')]"
    until(lambda: browser.find_elements(By.XPATH, message), "the message", 60)
    assert not any(one["size"][0] for one in browser.execute_async_script(READ)), (
        "no picture of other settings"
    )
