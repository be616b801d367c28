"""States of a model in which an edit could change nothing: it works exactly, or one sentence says what to do."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from torch import nn

import erasekit as ek
from erasekit import edits, methods
from erasekit.paths import ROOT

FUSED = "unet.unfuse_qkv_projections()"
LOADED = "pipeline.unload_lora_weights()"


def picture(model):
    return np.asarray(model.generate(["a church"], seeds=[0], steps=4)[0]).astype(int)


@pytest.fixture(scope="module")
def edit():
    return ek.uce.fit(ek.load(tiny_pipeline()), "church", preserve=["castle", "house"])


@pytest.fixture
def with_lora(model, edit, tmp_path):
    model.fingerprint()
    edit.to_lora(tmp_path / "lora", model=model)
    model.pipeline.load_lora_weights(tmp_path / "lora")
    return model


def refused(model, edit, tmp_path, says: str) -> None:
    for act in (
        lambda: edit.applied(model).__enter__(),
        lambda: edit.merged(model),
        lambda: edit.to_lora(tmp_path / "out", model=model),
        lambda: edit.to_projections(tmp_path / "out.safetensors", model=model),
    ):
        with pytest.raises(ValueError) as error:
            act()
        assert says in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("method", methods.METHODS)
def test_no_method_fits_a_model_with_fused_projections_or_a_lora(method, with_lora):
    with pytest.raises(ValueError) as error:
        getattr(ek, method).fit(with_lora, "church")
    assert LOADED in str(error.value)
    fused = ek.load(tiny_pipeline())
    fused.unet.fuse_qkv_projections()
    with pytest.raises(ValueError) as error:
        getattr(ek, method).fit(fused, "church")
    assert FUSED in str(error.value)


def test_an_edit_of_fused_projections_is_refused_and_works_once_they_are_not(model, edit, tmp_path):
    plain = picture(model)
    with edit.applied(model):
        wanted = picture(model)
    model.unet.fuse_qkv_projections()
    refused(model, edit, tmp_path, FUSED)
    # the control: written without the check, the same weights change nothing
    for parameter, value in edit._edited(model, 1.0):
        parameter.data = value
    assert abs(picture(model) - plain).max() <= 1 < abs(wanted - plain).max()


def test_unfused_again_the_picture_is_the_edited_one(model, edit):
    with edit.applied(model):
        wanted = picture(model)
    model.unet.fuse_qkv_projections()
    model.unet.unfuse_qkv_projections()
    with edit.applied(model):
        np.testing.assert_array_equal(picture(model), wanted)


def test_fusing_inside_the_block_is_said_at_its_end_and_unfusing_undoes_the_edit(model, edit):
    plain = picture(model)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"), edit.applied(model):
        model.unet.fuse_qkv_projections()
    assert abs(picture(model) - plain).max() > 1  # the fused copies keep the edit
    model.unet.unfuse_qkv_projections()
    np.testing.assert_array_equal(picture(model), plain)


def test_an_error_inside_the_block_is_not_hidden_by_the_one_about_fusing(model, edit):
    with pytest.raises(KeyError), edit.applied(model):
        model.unet.fuse_qkv_projections()
        raise KeyError("mine")


def test_a_loaded_lora_is_refused_and_unloaded_the_model_takes_the_edit(with_lora, edit, tmp_path):
    refused(with_lora, edit, tmp_path, LOADED)
    with_lora.pipeline.unload_lora_weights()
    again = ek.load(with_lora.pipeline)
    plain = picture(again)
    with edit.applied(again):
        assert abs(picture(again) - plain).max() > 1


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_unet_has_the_same_fingerprint_and_takes_the_edit(how, model, edit, tmp_path):
    plain, fingerprint = picture(model), model.fingerprint()
    with edit.applied(model):
        wanted = picture(model)
    pipeline = tiny_pipeline()
    if how == "wrapped":
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    else:
        pipeline.unet.compile(backend="eager")
    compiled = ek.load(pipeline)
    assert compiled.fingerprint() == fingerprint
    with edit.applied(compiled):
        np.testing.assert_array_equal(picture(compiled), wanted)
        # the compiled module itself draws with the edit, not with weights of its own
        x, text = torch.ones(1, 4, 8, 8), compiled.encode("a church")
        with torch.no_grad():
            edited = pipeline.unet(x, 1, text).sample
    with torch.no_grad():
        assert not torch.equal(pipeline.unet(x, 1, text).sample, edited)
    np.testing.assert_array_equal(picture(compiled), plain)
    for write in (edit.to_lora, edit.to_projections):
        write(tmp_path / write.__name__, model=compiled)
    assert edit.to_projections(tmp_path / "kv.safetensors", model=compiled).stat().st_size > 0
    assert not any(b"_orig_mod" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


class Stubborn(nn.Parameter):
    """Takes an assignment and keeps what it had, as quantized tensors may."""

    data = property(lambda self: self.detach(), lambda self, value: None)


def test_a_weight_that_does_not_take_its_value_is_an_error():
    edits._write_values([(nn.Parameter(torch.zeros(2)), torch.ones(2))])  # the control
    with pytest.raises(ValueError, match="did not take its new value"):
        edits._write_values([(Stubborn(torch.zeros(2)), torch.ones(2))])


INSTALLED = """
import sys
sys.path.insert(0, sys.argv[2])
from conftest import tiny_pipeline
import erasekit as ek
assert ek.__file__.startswith(sys.argv[1]), ek.__file__
ek.attacks, ek.evaluate
model = ek.load(tiny_pipeline())
edit = ek.uce.fit(model, erase="church", preserve=["castle", "house"])
with edit.applied(model):
    model.generate(["a church"], seeds=[0], steps=2)
edit.save("church.safetensors")
ek.Edit.load("church.safetensors").to_lora("lora", model=model)
try:
    ek.load("emoji")
except FileNotFoundError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path):
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(ROOT / "erasekit", source / "erasekit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("ERASEKIT_WORLD", None)
    command = [sys.executable, "-c", INSTALLED, site, ROOT / "tests"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ERASEKIT_WORLD" in done.stdout
    found = [sys.executable, "-c", "import erasekit as ek; print(ek.load('emoji').preset)"]
    environment["ERASEKIT_WORLD"] = str(ROOT / "data" / "emoji")
    done = subprocess.run(found, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "emoji", done.stderr
