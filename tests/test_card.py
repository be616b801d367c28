"""The card of an edit: its numbers are those of the files, and what is not measured is said."""

import ast
import base64
import io
import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

import erasekit as ek
from erasekit import card, cli, figures
from erasekit.evaluate import metrics, records
from erasekit.evaluate.records import EditMade, Measurement, Result

HASH = "0123456789abcdef"


@pytest.fixture
def edit(model):
    return ek.uce.fit(model, "cat", ["dog"], config=ek.uce.Config())


def written(folder, name, made: EditMade, rates, base, **more):
    """A result file: rates {(measure, edit): (k, n)} on the model with the fingerprint `base`."""
    rows = tuple(
        Measurement(measure, metrics.rate(*kn), of, "p", HASH, **more) for (measure, of), kn in rates.items()
    )
    kind = "attack" if "attack" in more else "deployment" if "step" in more else "protocol"
    found = Result(f"make {name}", kind, base, erased=("cat",), edits={made.label: made}, measurements=rows)
    records.save(found, folder / f"{name}.json")


def results(folder, edit, base=None, **changes):
    """One protocol, one attack and two ways of use of an edit like `edit`."""
    base = base or edit.metadata["base"]
    made = replace(EditMade.of(edit, ek.uce.Config()), **changes)
    both = lambda measure, before, after: {(measure, "original"): before, (measure, "uce"): after}
    written(
        folder, "asked", made, both("target", (30, 30), (2, 30)) | both("others", (29, 30), (28, 30)), base
    )
    attacked = both("raw", (20, 20), (0, 20)) | both("attack", (20, 20), (7, 20))
    written(folder, "attacked", made, attacked | {("attack", "no text"): (3, 20)}, base, attack="Search")
    written(folder, "merged", made, both("target", (30, 30), (29, 30)), base, step="averaged")
    written(folder, "rounded", made, both("target", (30, 30), (1, 30)), base, step="rounded")


def test_numbers_are_those_of_the_files(model, edit, tmp_path):
    results(tmp_path, edit)
    made = card.make(edit, model, prompts=["a cat"], results=tmp_path)
    tables = dict(made._tables())
    protocols = tables["Protocols"].set_index("what")
    assert protocols.loc["asked for by name, still seen", "unedited"] == metrics.text(metrics.rate(30, 30))
    assert protocols.loc["asked for by name, still seen", "edited"] == metrics.text(metrics.rate(2, 30))
    assert protocols.loc["everything else, right", "edited"] == metrics.text(metrics.rate(28, 30))
    attack = tables["Attacks: pictures in which it is seen"].iloc[0]
    assert attack["as asked"] == metrics.text(metrics.rate(0, 20))
    assert attack["after the attack"] == metrics.text(metrics.rate(7, 20))
    assert attack["by chance"] == metrics.text(metrics.rate(3, 20))
    limits = " ".join(made.limits())
    assert "Search 7 of 20 (by chance 3 of 20)" in limits
    assert "Of 2 ways of use these bring it back: averaged (29 of 30)." in limits
    assert (
        "Not measured: prompts that mean it without naming it; what stands beside it in a sentence." in limits
    )
    assert edit.digest in made.html() and "make attacked" in made.html()


def test_another_edit_has_no_share_in_them(model, edit, tmp_path):
    """Control of the test above: other settings, concepts and models, preserved concepts that were not written down."""
    other = ek.uce.Config(lam=0.7)
    for changes in (
        {"config": records.plain(ek.uce.fit(model, "cat", ["dog"], config=other).metadata["config"])},
        {"erased": ("dog",)},
        {"preserved": ("fox",)},
        {"preserved": None},
        {"method": "rece"},
        {"base": "0" * 64},
    ):
        for old in tmp_path.glob("*.json"):
            old.unlink()
        results(tmp_path, edit, digest="of another machine", **changes)
        made = card.make(edit, model, prompts=["a cat"], results=tmp_path)
        assert made.measured.empty and "Nothing yet." in made.html() and "Nothing yet." in made.markdown()
        assert all(question in " ".join(made.limits()) for question in card.ASKED)


def test_the_same_settings_count_and_are_told_apart(model, edit, tmp_path):
    """Also where a setting came after the file was written."""
    config = {name: value for name, value in edit.metadata["config"].items() if name != "entries"}
    results(tmp_path, edit, digest="of another machine", config=config)
    made = card.make(edit, model, prompts=["a cat"], results=tmp_path)
    assert len(made.measured) == 6 and not made.measured["exact"].any()
    assert "asked.json *" in made.html() and made._star in made.markdown()
    results(tmp_path, edit)
    made = card.make(edit, model, prompts=["a cat"], results=tmp_path)
    assert made.measured["exact"].all() and "asked.json *" not in made.html()


def test_pictures_are_the_models_and_blurred_elsewhere(model, edit, tmp_path):
    made = card.make(edit, model, prompts=["a cat", "a dog"], seed=3, results=tmp_path, show=True)
    before = model.generate(["a cat", "a dog"], seeds=[3, 3])
    with edit.applied(model):
        after = model.generate(["a cat", "a dog"], seeds=[3, 3])
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', made.html())
    shown = [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]
    wanted = [before[0], after[0], before[1], after[1]]
    assert [one.tobytes() for one in shown] == [one.tobytes() for one in wanted]
    assert before[0].tobytes() != after[0].tobytes()
    hidden = card.make(edit, model, prompts=["a cat"], seed=3, results=tmp_path)
    assert hidden.hidden and "Blurred" in hidden.html() and not made.hidden
    assert hidden.grid[0][1].tobytes() == figures.blurred(before[0]).tobytes()
    assert found[0] not in hidden.html()  # the picture itself is nowhere in the page


def test_markdown_has_its_mosaic_beside_it(model, edit, tmp_path):
    made = card.make(edit, model, prompts=["a cat", "a dog"], results=tmp_path, show=True)
    path = made.save(tmp_path / "cat.md")
    text = path.read_text()
    assert text.startswith("---\nlibrary_name: diffusers\n") and "![before and after](cat.png)" in text
    with Image.open(tmp_path / "cat.png") as sheet:
        side = made.grid[0][1].width
        assert sheet.size == (2 * side + 2, 2 * side + 2)
    with pytest.raises(ValueError, match=r"written as \.html or \.md"):
        made.save(tmp_path / "cat.txt")


def test_a_page_says_how_its_edit_is_loaded(model, edit, tmp_path):
    """Every way that the page names works; what an edit cannot do is not on it."""
    ways = dict(card._loading(edit, model))
    assert any("load_lora_weights" in code for code in ways.values())
    edit.to_lora(tmp_path / "lora", model=model)
    bias = next(n for n, p in model.unet.named_parameters() if n.endswith("conv_in.bias"))
    delta = {f"unet.{bias}": model.unet.get_parameter(bias).detach() * 0 + 0.1}
    convolution = ek.Edit.from_weight_delta(
        delta, model, method="esd", config={}, concepts={"erase": ["cat"]}
    )
    assert not any("load_lora_weights" in code for _, code in card._loading(convolution, model))
    with pytest.raises(ValueError, match="cannot become a LoRA"):
        convolution.to_lora(tmp_path / "lora2", model=model)
    seen = ek.adavd.fit(model, "cat", config=ek.adavd.Config())
    assert len(card._loading(seen, model)) == 1
    assert "changes no weight" in " ".join(card.make(seen, model, results=tmp_path).limits())


def test_the_code_of_a_page_imports_what_it_uses(model, edit):
    name = f"text_encoder.{next(n for n, _ in model.text_encoder.named_parameters())}"
    delta = torch.zeros_like(model.text_encoder.get_parameter(name.partition(".")[2]))
    for one in (edit, ek.Edit.from_weight_delta({name: delta}, model)):
        for _, code in card._loading(one, model):
            tree = ast.parse(code)
            imported = {
                alias.name
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert {one for one in used if one[0].isupper()} <= imported


def test_what_has_no_card_is_one_clear_error(model, edit, tmp_path):
    nameless = ek.Edit.from_weight_delta({"unet.conv_in.bias": torch.ones(16)}, model)
    with pytest.raises(ValueError, match="names no concepts to draw: give prompts="):
        card.make(nameless, model, results=tmp_path)
    (shown,) = card.make(nameless, model, prompts="a cat", results=tmp_path).grid  # controls
    assert shown[0] == "a cat"
    with edit.applied(model), pytest.raises(ValueError, match="leave its `with` block first"):
        card.make(edit, model, results=tmp_path)  # its "before" would be after


def test_names_are_shown_as_text(model, tmp_path):
    odd = ek.uce.fit(model, "<b>cat</b>", config=ek.uce.Config())
    page = card.make(odd, model, results=tmp_path).html()
    assert "<b>cat" not in page and "&lt;b&gt;cat&lt;/b&gt;, erased by UCE" in page


def test_an_edit_of_another_model_has_no_card(model, edit, tmp_path):
    with pytest.raises(ValueError, match="made for the model"):
        card.make(replace(edit, metadata=edit.metadata | {"base": "0" * 64}), model, results=tmp_path)


@pytest.mark.slow
def test_the_command_writes_a_card_of_the_emoji_world(tmp_path, capsys):
    emoji = ek.load("emoji", device="cpu")
    ek.uce.fit(emoji, "dog", ["cat", "horse", "fox"]).save(tmp_path / "dog.safetensors")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["card", str(tmp_path / "dog.safetensors"), "--prompt", "a dog in flat style"])
    assert stopped.value.code in (None, 0), capsys.readouterr()
    page = (tmp_path / "dog.html").read_text()
    found = json.loads((records.RESULTS / "objects_uce_dog.json").read_text())
    rate = next(m["value"] for m in found["measurements"] if m["measure"] == "Acc_e")
    assert metrics.text(rate) in page and "Blurred" not in page
