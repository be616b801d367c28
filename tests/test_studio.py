"""The studio: one drawing kept step by step, its figure, its panel by the widget objects, and in a real browser."""

import base64
import io

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
from erasekit import sampling  # noqa: E402
from erasekit.layers import attention_with_gradient  # noqa: E402
from erasekit.studio import LIVE, enlarged, estimated, watch  # noqa: E402
from erasekit.widgets import studio  # noqa: E402

HOW = {"steps": 3, "guidance": 3.0}


@pytest.fixture(scope="module")
def tiny() -> ek.DiffusionModel:
    return ek.load(tiny_pipeline())


@pytest.fixture(scope="module")
def edit(tiny) -> ek.Edit:
    return ek.uce.fit(tiny, "dog", ["castle"])


def shown(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


class Controls:
    """A panel by what is written beside its controls."""

    def __init__(self, panel):
        waiting, self.widgets = [panel], []
        while waiting:
            self.widgets.append(one := waiting.pop(0))
            waiting[:0] = getattr(one, "children", ())  # in the order in which they are seen

    def __getitem__(self, description):
        (found,) = (one for one in self.widgets if getattr(one, "description", None) == description)
        return found

    @property
    def pictures(self) -> list[np.ndarray]:
        """Before and after, at the chosen step; none where the panel says why there is nothing."""
        images = [one for one in self.widgets if type(one).__name__ == "Image"]
        return [shown(one.value) for one in images[::2] if one.value]

    @property
    def maps(self) -> list[np.ndarray]:
        images = [one for one in self.widgets if type(one).__name__ == "Image"]
        return [shown(one.value) for one in images[1::2] if one.value and one.layout.display != "none"]

    @property
    def text(self) -> str:
        return " ".join(one.value for one in self.widgets if type(one).__name__ == "HTML")


# One drawing


@pytest.mark.parametrize("edited, strength", [(False, 1.0), (True, 1.0), (True, 0.5)])
def test_watching_changes_nothing(tiny, edit, edited, strength):
    used = edit if edited else None
    way = watch(tiny, used, "a dog", 4, strength=strength, **HOW)
    if edited:
        with edit.applied(tiny, scale=strength):
            (picture,) = tiny.generate(["a dog"], [4], **HOW)
    else:
        (picture,) = tiny.generate(["a dog"], [4], **HOW)
    assert np.array_equal(way.estimates[-1], picture) and len(way.estimates) == HOW["steps"] + 1
    assert way.tokens[0] == "start" and way.tokens[-1] == "end" and way.tokens[-2] == "dog"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_estimate_is_the_schedulers_own(prediction):
    model = ek.load(tiny_pipeline())
    ddim = sampling.ddim(model.scheduler)
    ddim.register_to_config(prediction_type=prediction)
    model.pipeline.scheduler = ddim
    apart = []
    compare = lambda state: apart.append(float((estimated(model, state, 3.0) - state["pred_x0"]).abs().max()))
    model.generate(["a dog"], [0], 4, 3.0, callback=compare)
    assert len(apart) == 4 and max(apart) < 1e-4


def test_maps_are_those_of_a_plain_pass(tiny):
    way = watch(tiny, None, "a dog", 0, **HOW)
    assert way.maps.shape[0] == HOW["steps"] and way.maps.shape[1] == len(way.tokens)
    states = []
    tiny.generate(["a dog"], [0], HOW["steps"], HOW["guidance"], callback=states.append)
    with attention_with_gradient(tiny.unet) as seen, torch.no_grad():
        tiny.unet(states[1]["sample"], states[1]["timestep"], encoder_hidden_states=tiny.encode(["a dog"]))
    rows = [one[0].mean(0) for one in seen.values()]
    assert all(torch.allclose(one.sum(-1), torch.ones(len(one)), atol=1e-5) for one in rows)
    side = way.maps.shape[-1]
    largest = next(one for one in rows if len(one) == side * side)  # no resizing in this layer
    if len(rows) == 1:
        wanted = largest.T.unflatten(1, (side, side))[: len(way.tokens)]
        assert torch.allclose(way.maps[1], wanted, atol=1e-5)
    # every pixel's attention is shared out among all tokens, padding included
    assert (way.maps.sum(1) <= 1 + 1e-5).all() and (way.maps.sum(1) > 0.05).all()
    assert not torch.allclose(way.maps[0], way.maps[-1])  # control: the steps are told apart


def test_an_attention_filter_is_drawn_without_maps(tiny):
    by_filter = ek.adavd.fit(tiny, "dog")
    way = watch(tiny, by_filter, "a dog", 0, **HOW)
    with by_filter.applied(tiny):
        (picture,) = tiny.generate(["a dog"], [0], **HOW)
    assert way.maps is None and "without maps" in way.why and np.array_equal(way.estimates[-1], picture)


def test_nothing_is_drawn_inside_an_edit(tiny, edit):
    with edit.applied(tiny), pytest.raises(ValueError, match="leave its `with` block"):
        watch(tiny, None, "a dog", 0, **HOW)


# Without widgets


def test_the_figure_shows_both_ways(tiny):
    fig = studio(tiny, "dog", preserve=["castle"], interactive=False, **HOW)
    assert len(fig.axes) == 2 * 5 and not plt.get_fignums()
    before = watch(tiny, None, "a dog", 0, **HOW)
    for ax, wanted in zip(fig.axes[:4], before.estimates, strict=True):
        assert np.array_equal(ax.images[0].get_array(), np.asarray(wanted))
    after = [ax.images[0].get_array() for ax in fig.axes[5:9]]
    assert not np.array_equal(after[-1], np.asarray(before.estimates[-1]))
    assert "attention to" in fig.axes[4].get_title()


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "say which concept"),
        ({"concept": "dog", "method": "esd"}, "method must be one of uce"),
        ({"concept": "dog", "edits": {"mine": "dog.safetensors"}}, r"edits\['mine'\] is a str"),
    ],
)
def test_what_cannot_be_shown_is_refused(tiny, given, message):
    with pytest.raises(ValueError, match=message):
        studio(tiny, interactive=False, **HOW, **given)


def test_edits_of_another_model_are_refused(edit):
    with pytest.raises(ValueError, match="was made for the model"):
        studio(ek.load(tiny_pipeline(seed=1)), "dog", edits={"mine": edit}, interactive=False)


# The panel, by its widgets


@pytest.fixture
def panel(tiny, edit) -> Controls:
    return Controls(studio(tiny, "dog", preserve=["castle"], edits={"mine": edit}, **HOW))


def test_the_slider_goes_through_what_was_drawn_once(tiny, edit, panel, monkeypatch):
    before, after = (watch(tiny, one, "a dog", 0, **HOW) for one in (None, edit))
    monkeypatch.setattr(tiny, "generate", None)  # drawing would now fail
    assert panel["Step"].max == panel["Step"].value == HOW["steps"]
    for step in (3, 0, 2):
        panel["Step"].value = step
        for there, way in zip(panel.pictures, (before, after), strict=True):
            assert np.array_equal(there, shown(enlarged(way.estimates[step]))), step
        assert ("finished" in panel.text) == (step == 3)
    maps = panel.maps
    assert len(maps) == 2
    panel["Token"].value = 0
    assert not np.array_equal(panel.maps[0], maps[0])


def test_every_control_changes_the_picture_as_the_model_says(tiny, panel):
    last = lambda used, prompt, seed, strength=1.0: shown(
        enlarged(watch(tiny, used, prompt, seed, strength=strength, **HOW).estimates[-1])
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
        ("Method", "no edit", lambda: (None, "a church", 5)),
    ]:
        panel[control].value = value
        assert np.array_equal(panel.pictures[1], last(*wanted())), (control, value)
    assert np.array_equal(*panel.pictures)


def test_every_live_method_is_drawn(panel):
    for name in LIVE:
        panel["Method"].value = name
        assert len(panel.pictures) == 2, (name, panel.text)
    panel["Method"].value = "adavd"
    assert "without maps" in panel.text and len(panel.maps) == 1


def test_bad_input_is_said_in_the_panel(panel):
    panel["Prompt"].value = " "
    assert not panel.pictures and "a prompt must be text" in panel.text
    panel["Prompt"].value = "a dog"
    panel["Preserve"].value = "dog"
    assert not panel.pictures and "dog" in panel.text and "finished" not in panel.text
    panel["Preserve"].value = "castle"
    assert len(panel.pictures) == 2 and "finished" in panel.text


def test_the_judge_may_see_nothing(monkeypatch):
    from erasekit import studio as module

    records = [{"dog": 0.9, "cat": 0.1}, {"dog": 0.2, "cat": 0.3}]
    monkeypatch.setattr(module, "checked", lambda judge, pictures, prompts: records)
    model = type("World", (), {"everything": ("dog", "cat")})()
    assert module.verdict(model, [None, None]) == ["dog 0.90", "none, at most cat 0.30"]


# In JupyterLab

NOTEBOOK = (
    """
import erasekit as ek
from erasekit.widgets import studio
model = ek.load("emoji")
""",
    """
studio(model, "dog", preserve=["cat"], prompt="a dog in flat style", steps=6)
""",
)
READ = """
const done = arguments[0];
Promise.all([...document.querySelectorAll(".widget-image")].map(async (image) => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return {png: btoa(String.fromCharCode(...bytes)), right: image.getBoundingClientRect().right};
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

    def wait_for(used, prompt, at=-1):
        ways = [watch(model, one, prompt, 0, steps=6) for one in (None, used)]
        wanted = [np.asarray(shown(enlarged(way.estimates[at]))) for way in ways]

        def there():
            found = browser.execute_async_script(READ)
            seen = [shown(base64.b64decode(one["png"])) for one in found[::2] if one["png"]]
            return len(seen) == 2 and all(map(np.array_equal, seen, wanted)) and found

        try:
            found = until(there, f"{prompt} at {at}", 90)
        finally:
            browser.save_screenshot(str(folder / "last.png"))
        assert all(one["right"] < browser.execute_script("return innerWidth") for one in found)

    browser.get(address.format("studio.ipynb"))
    until(lambda: browser.execute_script(IDLE), "a kernel")
    browser.execute_script(RUN, 0)
    browser.execute_script(RUN, 1)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, ".widget-image"), "the panel")
    wait_for(ek.uce.fit(model, "dog", ["cat"]), "a dog in flat style")
    browser.find_elements(By.CSS_SELECTOR, ".noUi-handle")[-1].send_keys(*[Keys.ARROW_LEFT] * 4)
    wait_for(ek.uce.fit(model, "dog", ["cat"]), "a dog in flat style", at=2)
    Select(field(browser, "Method", "select")).select_by_visible_text("RECE")
    wait_for(ek.rece.fit(model, "dog", ["cat"]), "a dog in flat style", at=2)
    enter(browser, "Concept", "church")
    enter(browser, "Prompt", "a church in noto style")
    wait_for(ek.rece.fit(model, "church", ["cat"]), "a church in noto style", at=2)
