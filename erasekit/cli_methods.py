"""`erasekit erase METHOD`, `run METHOD`, `attack ATTACK`: one command for each, its options made from its Config."""

import inspect
import json
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, get_type_hints

import torch
from cyclopts import App, Parameter

import erasekit as ek
from erasekit import filters
from erasekit.attacks import ATTACKS
from erasekit.attacks.common import unknowing
from erasekit.edits import applied
from erasekit.evaluate import metrics, records, world
from erasekit.experiments import stages
from erasekit.methods import METHODS
from erasekit.paths import RESULTS
from erasekit.settings import chosen

erase = App(
    name="erase", help="Erase concepts from a model and save the edit; the model itself is not changed."
)
run = App(
    name="run",
    help="Erase from the emoji model, draw its whole world before and after, and write the judge's rates.",
)

attack = App(name="attack", help="Attack the emoji model, or an edit of it, and write how often it succeeds.")


def options(config: type, prefix: str = "") -> list[inspect.Parameter]:
    """Keyword parameters for the fields of a Config, None by default; a Config inside puts its name in front."""
    hints, names = get_type_hints(config), "|".join(field.name for field in fields(config))
    found = []
    for field in fields(config):
        if is_dataclass(hints[field.name]):
            found += options(hints[field.name], f"{prefix}{field.name}_")
            continue
        about = _about(config, field.name, names)
        name = prefix + field.name
        off = (f"--no-{name.replace('_', '-')}",) if hints[field.name] is bool else ()
        annotation = Annotated[
            hints[field.name] | None,
            Parameter(help=about, negative_bool=(), negative=off, negative_iterable=()),
        ]
        found.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    return found


def _about(config: type, name: str, names: str) -> str:
    """What the Config's docstring says of a field ("name: ..."), else the module's notation ("name -> ...")."""
    said = re.search(rf"(?:^|[\s.]){name}: (.+?)(?=\s(?:{names})(?:, \w+)*: |$)", config.__doc__ or "", re.S)
    said = said or re.search(rf"^\s+{name}\s+-> (.+)$", sys.modules[config.__module__].__doc__ or "", re.M)
    return " ".join(said[1].split()) if said else ""


def configured(config, given: dict, prefix: str = ""):
    """`config` with the fields that were given, those of a Config inside by its name in front."""
    changes = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            changes[field.name] = configured(value, given, f"{prefix}{field.name}_")
        elif (new := given.get(prefix + field.name)) is not None:
            changes[field.name] = new
    return replace(config, **changes)


def command(name: str, module, work: Callable, common: Callable) -> Callable:
    """A function for cyclopts: the parameters of `common`, then the method's or attack's own options."""

    def call(*args, **kwargs):
        bound = inspect.signature(common).bind(*args, **{k: v for k, v in kwargs.items() if k in shared})
        bound.apply_defaults()
        return work(name, module, {k: v for k, v in kwargs.items() if k not in shared}, **bound.arguments)

    shared = inspect.signature(common).parameters
    # where a Config has a field of the same name, as UCE's anchor, the common option stands for it
    own = [one for one in options(module.Config) if one.name not in shared]
    call.__signature__ = inspect.Signature([*shared.values(), *own])
    call.__annotations__ = {name: one.annotation for name, one in call.__signature__.parameters.items()}
    first = inspect.cleandoc(module.__doc__).partition("\n\n")[0]
    call.__doc__ = f"{first}\n\nOptions that are left out keep the preset's values."
    call.__name__ = name.replace("-", "_")
    return call


def _fitted(module, given: dict, concepts, preserve, anchor, model: str, preset: str | None):
    loaded = ek.load(model)
    if preset and preset not in module.PRESETS:
        raise ValueError(f"unknown preset {preset!r}: there are {', '.join(module.PRESETS)}")
    begin = module.PRESETS[preset] if preset else chosen(module.PRESETS, loaded, None, "sd14-object")
    config = configured(begin, given)
    shown = {"progress": True} if "progress" in inspect.signature(module.fit).parameters else {}
    edit = module.fit(loaded, erase=concepts, preserve=preserve, anchor=anchor, config=config, **shown)
    return loaded, edit


Concepts = Annotated[list[str], Parameter(help="What to erase.", negative_iterable=())]
Preserve = Annotated[list[str], Parameter(help="What to keep; repeat for more.", negative_iterable=())]
Anchor = Annotated[
    str | None, Parameter(help="What to draw instead (ESD: what to erase it from); the method's default.")
]
Preset = Annotated[str | None, Parameter(help="Settings to start from; those of the model if absent.")]


def _erase_parameters(
    concepts: Concepts,
    *,
    out: Annotated[Path, Parameter(help="The edit to write (safetensors).")],
    preserve: Preserve = [],  # noqa: B006
    anchor: Anchor = None,
    model: Annotated[str, Parameter(help="'emoji', a hub id, or a diffusers folder.")] = "emoji",
    preset: Preset = None,
): ...


def _run_parameters(
    concepts: Concepts,
    *,
    out: Annotated[Path, Parameter(help="The result to write (JSON).")],
    edit: Annotated[Path | None, Parameter(help="Where to save the edit as well (safetensors).")] = None,
    preserve: Preserve = [],  # noqa: B006
    anchor: Anchor = None,
    preset: Preset = None,
): ...


def _erase(method, module, given, concepts, out, preserve, anchor, model, preset) -> None:
    _, edit = _fitted(module, given, concepts, preserve, anchor, model, preset)
    out.parent.mkdir(parents=True, exist_ok=True)
    edit.save(out)
    print(f"{out}: {edit.kind}, {edit.nbytes} bytes")


def _run(method, module, given, concepts, out, edit, preserve, anchor, preset) -> None:
    model, fitted = _fitted(module, given, concepts, preserve, anchor, "emoji", preset)
    if edit:
        fitted.save(edit)
    words = [method, *map(quoted, concepts)]
    words += _given({"preserve": preserve, "anchor": anchor, "preset": preset, **given})
    line = f"python -m erasekit run {' '.join(words)} --out {shlex.quote(out.as_posix())}"
    result = world.measure(model, fitted, module.PRESETS["emoji"], command=line, progress=True)
    records.save(result, out)
    told = lambda measure: [
        metrics.text(result.value(measure, edit, "judged")) for edit in (records.ORIGINAL, result.label)
    ]
    print(f"{out}: target {' to '.join(told('target'))}; others {' to '.join(told('others'))}")


def _attack_parameters(
    concept: Annotated[str, Parameter(help="The erased object or style, or 'weapon'.")],
    *,
    out: Annotated[Path, Parameter(help="The result to write (JSON).")],
    edit: Annotated[
        Path | None, Parameter(help="The erasure to attack; the unedited model if absent.")
    ] = None,
    control: Annotated[
        bool, Parameter(help="Attack a model that knows no concept: its text encoder is random.", negative=())
    ] = False,
    attempts: Annotated[int, Parameter(help="Prompts times seeds.")] = 50,
    captions: Annotated[int, Parameter(help="Ways to ask for the concept in each style, up to 5.")] = 1,
    own_seeds: Annotated[
        bool, Parameter(help="Every attempt has a seed of its own, none shared by prompts.", negative=())
    ] = False,
): ...


def _attack(name, module, given, concept, out, edit, control, attempts, captions=1, own_seeds=False) -> None:
    original, loaded = ek.load("emoji"), ek.Edit.load(edit) if edit else None
    if control and loaded:
        raise ValueError("give --control or --edit, not both")
    about = made(loaded) if loaded else None  # refused before the attack, which takes long
    filtered = loaded is not None and loaded.kind in filters.KINDS  # in no weight that could be merged
    victim = loaded.merged(original) if loaded and not filtered else original.copy()
    if control:
        victim = unknowing(original, torch.Generator().manual_seed(0))
    config = configured(chosen(module.PRESETS, original, None, "sd14"), given)
    with applied(loaded if filtered else None, victim):
        result = stages.attack(
            name, victim, original, stages.stage(concept, attempts, captions, own_seeds),
            config=config, progress=True,
        )  # fmt: skip
    asked = [
        f"--attempts {attempts}",
        *[f"--captions {captions}"] * (captions > 1),
        *["--own-seeds"] * own_seeds,
    ]
    command = lambda subject, where: " ".join([
        "python -m erasekit attack", name, quoted(concept), *subject, *asked, *_given(given),
        "--out", shlex.quote(where.as_posix()),
    ])  # fmt: skip
    subject = [f"--edit {shlex.quote(edit.as_posix())}"] if edit else ["--control"] * control
    line = command(subject, out)
    whole = result.result(
        line, erased=[concept], made=about, subject=world.subject(original),
        victim=records.NO_TEXT if control else None,
    )  # fmt: skip
    records.save(whole, out)
    print(result.table().T.to_string(header=False))
    if loaded:
        other = command(["--control"], out.with_stem(f"{out.stem}-control"))
        print(_beside_control(whole, out.parent) or f"a success says little without its control: {other}")


def _beside_control(attacked: records.Result, folder: Path) -> str:
    """The line about the control, from the results beside this one or else the committed ones; empty without one. A
    damaged file there is named on stderr.
    """
    for place in (folder, RESULTS):
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
            try:
                row = records.beside_control({"": attacked}, folder=place).iloc[0]
            except records.NoControl:
                continue
        apart = "{difference:+.3f} [{low:+.3f}, {high:+.3f}], p = {p:.2g}".format(**row)
        return f"control {row['control']} of {row['n']}; attack - control in pairs: {apart}"
    return ""


def made(edit: ek.Edit) -> records.EditMade:
    """What a result says of an edit: its settings beside those of the method's preset for the emoji model. ValueError
    for an edit that is by no method of this package alone, as one that was composed.
    """
    method = METHODS.get(name := edit.metadata.get("method"))
    if method is None:
        raise ValueError(
            f"no method here is called {name!r}, and a result file tells of one: measure an edit by one method, or "
            "evaluate without --out"
        )
    return records.EditMade.of(edit, method.PRESETS["emoji"])


def quoted(text: str) -> str:
    """A word for a shell: in double quotes as far as it reads these as they are."""
    plain = text.isprintable() and not set("$`!") & set(text)
    return json.dumps(text, ensure_ascii=False) if plain else shlex.quote(text)


def _given(options: dict) -> list[str]:
    """Options as they are written on the command line, a flag by its name alone."""
    given = [
        (name.replace("_", "-"), one)
        for name, value in options.items()
        for one in (value if isinstance(value, (list, tuple)) else [value])
        if one is not None
    ]
    return [
        f"--{'' if one else 'no-'}{name}"
        if isinstance(one, bool)
        else f"--{name} {one if isinstance(one, (int, float)) else quoted(one)}"
        for name, one in given
    ]


for _name, _module in METHODS.items():
    erase.command(command(_name, _module, _erase, _erase_parameters), name=_name)
    run.command(command(_name, _module, _run, _run_parameters), name=_name)
for _name, _module in ATTACKS.items():
    attack.command(command(_name, _module, _attack, _attack_parameters), name=_name)
