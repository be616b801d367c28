"""The explorer: what it refuses, its static figure, its panel by the widget objects, and the panel in a real browser.

The last needs Chromium with its driver and selenium (the extra `browser`), and is skipped where one is missing.
"""

import asyncio
import base64
import io
import sys
import threading

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import nbformat  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from browsing import IDLE, RUN, browser, enter, field, lab, until  # noqa: E402, F401
from conftest import tiny_pipeline  # noqa: E402
from nbformat.v4 import new_code_cell, new_notebook  # noqa: E402
from PIL import Image  # noqa: E402

import erasekit as ek  # noqa: E402
from erasekit.widgets import explore  # noqa: E402

HOW = {"steps": 2, "guidance": 3.0}
PROMPTS = ["a church in flat style", "a dog"]


@pytest.fixture(scope="module")
def tiny() -> ek.DiffusionModel:
    return ek.load(tiny_pipeline())


@pytest.fixture(scope="module")
def edits(tiny) -> dict[str, ek.Edit]:
    return {
        "UCE, church": ek.uce.fit(tiny, "church", ["castle", "house"]),
        "UCE, dog": ek.uce.fit(tiny, "dog", ["castle"]),
    }


def drawn(model, edit, prompt, seed, strength=1.0, **how) -> np.ndarray:
    """The picture that the model itself gives, every pixel a square, 256 wide."""
    if edit is None:
        (picture,) = model.generate([prompt], seeds=[seed], **how)
    else:
        with edit.applied(model, scale=strength):
            (picture,) = model.generate([prompt], seeds=[seed], **how)
    factor = 256 // picture.width
    return np.asarray(picture).repeat(factor, 0).repeat(factor, 1)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def same(shown, wanted) -> bool:
    return len(shown) == len(wanted) and all(map(np.array_equal, shown, wanted))


class Panel:
    """A panel by its widget objects: controls by what is written beside them, and what there is to see."""

    def __init__(self, panel):
        self.widgets, waiting = [], [panel]
        while waiting:
            self.widgets.append(one := waiting.pop(0))
            waiting += getattr(one, "children", ())
        (self.sides,) = (one for one in self.widgets if self["Swap"] in getattr(one, "children", ()))

    def __getitem__(self, description):
        (found,) = (one for one in self.widgets if getattr(one, "description", None) == description)
        return found

    def __contains__(self, description):
        return description in [getattr(one, "description", None) for one in self.widgets]

    @property
    def pictures(self) -> list[np.ndarray]:
        """Those that are visible and belong to the settings."""
        hidden = self.sides.layout.display == "none" or "erasekit-stale" in self.sides._dom_classes
        return [] if hidden else [pixels(side.children[1].value) for side in self.sides.children[::2]]

    @property
    def captions(self) -> list[str]:
        return [side.children[0].value for side in self.sides.children[::2]]

    @property
    def text(self) -> str:
        return " ".join(one.value for one in self.widgets if type(one).__name__ == "HTML")


# What is refused, before anything is drawn


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda edits: {}, "at least one edit"),
        (lambda edits: list(edits.values()), "dict"),
        (lambda edits: {"church": "church.safetensors"}, r"edits\['church'\] is a str"),
        (lambda edits: {3: edits["UCE, dog"]}, "label"),
        (lambda edits: {" ": edits["UCE, dog"]}, "label"),
    ],
)
def test_only_named_edits_are_taken(tiny, edits, interactive, change, message):
    with pytest.raises(ValueError, match=message):
        explore(tiny, change(edits), interactive=interactive)


@pytest.mark.parametrize("interactive", [False, True])
def test_an_edit_of_another_model_is_named(edits, interactive):
    other = ek.load(tiny_pipeline(seed=1))
    with pytest.raises(ValueError, match=r"edits\['UCE, church'\].*was made for the model"):
        explore(other, edits, interactive=interactive)


def test_a_pipeline_is_no_model(tiny, edits):
    with pytest.raises(ValueError, match="load"):
        explore(tiny.pipeline, edits)


@pytest.mark.parametrize("nothing", [{"prompts": []}, {"seeds": []}])
def test_there_must_be_something_to_draw(tiny, edits, nothing):
    with pytest.raises(ValueError, match="at least one prompt and one seed"):
        explore(tiny, edits, interactive=False, **nothing)


def test_a_picture_before_is_never_drawn_with_an_edit_in_force(tiny, edits):
    with edits["UCE, church"].applied(tiny):
        with pytest.raises(ValueError, match="leave its `with` block"):
            explore(tiny, edits, interactive=False, **HOW)
        panel = Panel(explore(tiny, edits, **HOW))
        assert not panel.pictures and "leave its `with` block" in panel.text
    panel["Seed"].value = 1
    assert len(panel.pictures) == 2


# Without widgets


def test_the_figure_shows_every_edit_and_needs_no_widgets(tiny, edits, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # importing it would now fail
    fig = explore(tiny, edits, interactive=False, prompts=PROMPTS, seeds=[0, 5], **HOW)
    (ax,) = fig.axes
    assert [one.get_text() for one in ax.get_yticklabels()] == ["before", *edits]
    heads = [" ".join(one.get_text().split()) for one in ax.get_xticklabels()]
    assert heads == [f"{prompt} seed {seed}" for prompt in PROMPTS for seed in (0, 5)]
    mosaic, step = ax.images[0].get_array(), 16 + 2
    for i, edit in enumerate([None, *edits.values()]):
        for j, (prompt, seed) in enumerate((prompt, seed) for prompt in PROMPTS for seed in (0, 5)):
            cell = mosaic[i * step : i * step + 16, j * step : j * step + 16]
            assert np.array_equal(cell, drawn(tiny, edit, prompt, seed, **HOW)[::16, ::16]), (i, j)
    assert not plt.get_fignums(), "an open figure would be shown a second time"


def test_without_prompts_it_asks_for_what_was_erased_then_preserved(tiny, edits):
    fig = explore(tiny, edits, interactive=False, seeds=0, **HOW)
    heads = [one.get_text().split("\n")[0] for one in fig.axes[0].get_xticklabels()]
    assert heads == ["church", "dog", "castle"]


# The panel, by its widgets


@pytest.fixture
def panel(tiny, edits) -> Panel:
    return Panel(explore(tiny, edits, prompts=PROMPTS, seeds=[3], **HOW))


def test_every_control_changes_the_pictures_as_the_model_says(tiny, edits, panel):
    church, dog = edits.values()
    show = lambda edit, prompt, seed, strength=1.0: [
        drawn(tiny, None, prompt, seed, **HOW),
        drawn(tiny, edit, prompt, seed, strength, **HOW),
    ]
    assert panel["Prompt"].options == tuple(PROMPTS)
    wanted = [show(church, PROMPTS[0], 3)]
    assert same(panel.pictures, wanted[-1])
    for control, value, pair in [
        ("Strength", 0.5, show(church, PROMPTS[0], 3, 0.5)),
        ("Seed", 4, show(church, PROMPTS[0], 4, 0.5)),
        ("Prompt", "a castle", show(church, "a castle", 4, 0.5)),
        ("Prompt", "a dog", show(church, "a dog", 4, 0.5)),
        ("Edit", "UCE, dog", show(dog, "a dog", 4, 0.5)),
        ("Strength", 0.0, [drawn(tiny, None, "a dog", 4, **HOW)] * 2),
    ]:
        panel[control].value = value
        assert same(panel.pictures, pair), (control, value)
        assert not same(pair, wanted[-1]), "the control must have something to change"
        wanted.append(pair)
    assert '"a dog"' in panel.text.replace("&quot;", '"') and "seed 4" in panel.text
    assert "UCE, dog, strength 0.00" in panel.captions[1]


def test_no_edit_shows_the_model_twice_and_has_no_strength(tiny, panel):
    assert not panel["Strength"].disabled
    panel["Edit"].value = None
    assert same(panel.pictures, [drawn(tiny, None, PROMPTS[0], 3, **HOW)] * 2)
    assert panel["Strength"].disabled and "no edit" in panel.captions[1]


def test_swap_exchanges_pictures_with_their_captions(panel):
    pictures, captions = panel.pictures, panel.captions
    assert not np.array_equal(*pictures) and "Before" in captions[0] and "After" in captions[1]
    panel["Swap"].value = True
    assert same(panel.pictures, pictures[::-1]) and panel.captions == captions[::-1]
    panel["Seed"].value = 4
    assert "After" in panel.captions[0], "a new drawing keeps the sides"
    panel["Seed"].value = 3
    panel["Swap"].value = False
    assert same(panel.pictures, pictures) and panel.captions == captions


def test_bad_input_is_said_and_leaves_no_picture_of_other_settings(panel):
    pictures = panel.pictures
    panel["Prompt"].value = "  "
    assert not panel.pictures and "a prompt must be text that says something" in panel.text
    panel["Prompt"].value = "church " * 30
    assert not panel.pictures and "the limit is 22" in panel.text
    panel["Prompt"].value = PROMPTS[0]
    assert same(panel.pictures, pictures)


def test_with_a_button_nothing_is_drawn_before_it_is_pressed(tiny, edits):
    panel = Panel(explore(tiny, edits, prompts=PROMPTS, seeds=[3], on_change=False, **HOW))
    assert not panel.pictures and "Press Draw" in panel.text
    panel["Draw"].click()
    first = panel.pictures
    assert same(first, [drawn(tiny, one, PROMPTS[0], 3, **HOW) for one in (None, edits["UCE, church"])])
    panel["Seed"].value = 4
    assert not panel.pictures and "Press Draw" in panel.text, "old pictures must not pass for new ones"
    panel["Draw"].click()
    assert len(panel.pictures) == 2 and not same(panel.pictures, first)


def test_the_button_is_there_only_when_it_is_needed(panel):
    assert "Swap" in panel and "Draw" not in panel


def test_text_is_shown_as_text(tiny, edits):
    panel = Panel(explore(tiny, {"<i>a</i>": edits["UCE, dog"]}, prompts=["dog <b>"], **HOW))
    assert "&lt;i&gt;a" in panel.captions[1] and "dog &lt;b&gt;" in panel.text
    assert "<i>" not in panel.text and "<b>&quot;" not in panel.text


def test_looking_leaves_the_model_as_it_was(edits):
    model = ek.load(tiny_pipeline())
    before = [parameter.data_ptr() for parameter in model.unet.parameters()]
    panel = Panel(explore(model, edits, prompts=PROMPTS, **HOW))
    panel["Strength"].value = 0.3
    assert [parameter.data_ptr() for parameter in model.unet.parameters()] == before


def test_a_kernel_draws_between_cells_in_its_own_thread_and_only_the_last_settings(tiny, edits, monkeypatch):
    """A front end may set widgets from another thread while a cell runs."""
    drawings, generate = [], tiny.generate

    def spy(prompts, seeds, **how):
        drawings.append((threading.current_thread(), *seeds))
        return generate(prompts, seeds=seeds, **how)

    monkeypatch.setattr(tiny, "generate", spy)

    async def cells():
        panel = Panel(explore(tiny, edits, prompts=PROMPTS, seeds=[3], **HOW))
        assert not drawings, "the cell that makes the panel is still running"
        await asyncio.sleep(0)
        assert len(panel.pictures) == 2
        with edits["UCE, church"].applied(tiny):  # a cell that uses the model
            for value in (4, 5, 6):
                other = threading.Thread(target=setattr, args=(panel["Seed"], "value", value))
                other.start()
                other.join()
            assert not panel.pictures and "Drawing" in panel.text
            assert {seed for _, seed in drawings} == {3}
        await asyncio.sleep(0)
        assert same(
            panel.pictures, [drawn(tiny, one, PROMPTS[0], 6, **HOW) for one in (None, edits["UCE, church"])]
        )

    asyncio.run(cells())
    assert {thread for thread, _ in drawings} == {threading.current_thread()}
    assert {seed for _, seed in drawings} == {3, 6}


# The panel in JupyterLab, in a browser that nobody sees

NOTEBOOK = (
    """
import erasekit as ek
from erasekit.widgets import explore
model = ek.load("emoji")
edits = {name: ek.Edit.load(name + ".safetensors") for name in ("church", "dog")}
""",
    """
explore(model, edits, prompts=["a church in flat style", "a dog in noto style"], steps=6)
""",
    """
import time
with edits["church"].applied(model):
    open("started", "w").close()
    time.sleep(3)
    model.generate(["a church in flat style"], seeds=[0], steps=6)[0].save("cell.png")
""",
)
READ = """
const done = arguments[0];
Promise.all([...document.querySelectorAll(".widget-image")].map(async (image) => {
    const box = image.parentElement, size = image.getBoundingClientRect();
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return {
        caption: box.querySelector(".widget-html").innerText.trim(),
        png: btoa(String.fromCharCode(...bytes)),
        size: [size.width, size.height, size.right],
        clear: size.width > 0 && getComputedStyle(image).opacity === "1",
    };
})).then(done, () => done([]));
"""


@pytest.mark.browser
@pytest.mark.slow
def test_the_panel_in_jupyterlab(lab, browser):  # noqa: F811
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    model = ek.load("emoji")
    edits = {
        "church": ek.uce.fit(model, "church", ["castle", "house"]),
        "dog": ek.uce.fit(model, "dog", ["cat"]),
    }
    folder, address = lab
    for name, edit in edits.items():
        edit.save(folder / f"{name}.safetensors")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [new_code_cell(source.strip()) for source in NOTEBOOK]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "explore.ipynb")

    def wait_for(wanted, *captions):
        """Until the page clearly shows these pictures under these captions, and no others."""

        def there():
            found = browser.execute_async_script(READ)
            return (
                [one["caption"].split(":")[0] for one in found] == list(captions)
                and all(one["clear"] for one in found)
                and same([pixels(base64.b64decode(one["png"])) for one in found], wanted)
                and found
            )

        try:
            return until(there, f"{captions} in the page", 90)
        finally:
            browser.save_screenshot(str(folder / "last.png"))

    def pair(edit, prompt, seed, strength=1.0):
        return [
            drawn(model, None, prompt, seed, steps=6),
            drawn(model, edits[edit], prompt, seed, strength, steps=6),
        ]

    browser.get(address.format("explore.ipynb"))
    until(lambda: browser.execute_script(IDLE), "a kernel")
    browser.execute_script(RUN, 0)
    browser.execute_script(RUN, 1)
    until(lambda: browser.find_elements(By.CSS_SELECTOR, ".widget-image"), "the panel")

    church = pair("church", "a church in flat style", 0)
    assert not np.array_equal(*church)
    for one in wait_for(church, "Before", "After"):
        assert one["size"][:2] == [258, 258], "64 pixels, four times as large, and a border"
        assert one["size"][2] < browser.execute_script("return innerWidth"), "nothing is cut off"

    browser.find_element(By.CSS_SELECTOR, ".widget-toggle-button").click()
    wait_for(church[::-1], "After", "Before")
    browser.find_element(By.CSS_SELECTOR, ".widget-toggle-button").click()
    wait_for(church, "Before", "After")

    enter(browser, "Seed", "7")
    wait_for(pair("church", "a church in flat style", 7), "Before", "After")
    enter(browser, "Prompt", "a dog in noto style")
    wait_for(pair("church", "a dog in noto style", 7), "Before", "After")
    Select(field(browser, "Edit", "select")).select_by_visible_text("dog")
    wait_for(pair("dog", "a dog in noto style", 7), "Before", "After")

    handle = browser.find_element(By.CSS_SELECTOR, ".noUi-handle")
    ActionChains(browser).drag_and_drop_by_offset(handle, -60, 0).perform()
    strength = float(browser.find_element(By.CSS_SELECTOR, ".widget-readout").text)
    assert 0 < strength < 1
    wait_for(pair("dog", "a dog in noto style", 7, strength), "Before", "After")
    Select(field(browser, "Edit", "select")).select_by_visible_text("none: the model as it is")
    wait_for([drawn(model, None, "a dog in noto style", 7, steps=6)] * 2, "Before", "After")

    enter(browser, "Prompt", " ")
    message = "//*[contains(text(), 'a prompt must be text that says something')]"
    until(lambda: browser.find_elements(By.XPATH, message), "the message", 60)
    assert not any(one["clear"] for one in browser.execute_async_script(READ)), "no picture of another prompt"
    enter(browser, "Prompt", "a church in flat style")
    Select(field(browser, "Edit", "select")).select_by_visible_text("church")
    wait_for(pair("church", "a church in flat style", 7, strength), "Before", "After")

    # A control that is moved while a cell has an edit in force: neither may see the other's weights.
    browser.execute_script(RUN, 2)
    until((folder / "started").exists, "the cell", 60)
    enter(browser, "Seed", "0")
    wait_for(pair("church", "a church in flat style", 0, strength), "Before", "After")
    assert np.array_equal(np.asarray(Image.open(folder / "cell.png")), church[1][::4, ::4])
