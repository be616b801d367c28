"""`erasekit erase METHOD` and `erasekit run METHOD`: one command per method, its options made from its Config."""

import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, get_type_hints

from cyclopts import App, Parameter

import erasekit as ek
from erasekit.evaluate import world
from erasekit.methods import METHODS
from erasekit.paths import write_atomically

erase = App(
    name="erase", help="Erase concepts from a model and save the edit; the model itself is not changed."
)
run = App(
    name="run",
    help="Erase from the emoji model, draw its whole world before and after, and write the judge's rates.",
)


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


def command(method: str, work: Callable, common: Callable) -> Callable:
    """A function for cyclopts: the parameters of `common`, then the method's own options."""
    module = METHODS[method]

    def call(*args, **kwargs):
        bound = inspect.signature(common).bind(*args, **{k: v for k, v in kwargs.items() if k in shared})
        bound.apply_defaults()
        return work(method, module, {k: v for k, v in kwargs.items() if k not in shared}, **bound.arguments)

    shared = inspect.signature(common).parameters
    # where a Config has a field of the same name, as UCE's anchor, the common option stands for it
    own = [one for one in options(module.Config) if one.name not in shared]
    call.__signature__ = inspect.Signature([*shared.values(), *own])
    call.__annotations__ = {name: one.annotation for name, one in call.__signature__.parameters.items()}
    call.__doc__ = (
        f"{(module.__doc__ or method).splitlines()[0]}\n\nOptions that are left out keep the preset's values."
    )
    call.__name__ = method
    return call


def _fitted(module, given: dict, concepts, preserve, anchor, model: str, preset: str | None):
    loaded = ek.load(model)
    name = preset or ("emoji" if loaded.preset == "emoji" else "sd14-object")
    if name not in module.PRESETS:
        raise ValueError(f"unknown preset {name!r}: there are {', '.join(module.PRESETS)}")
    config = configured(module.PRESETS[name], given)
    return loaded, module.fit(loaded, erase=concepts, preserve=preserve, anchor=anchor, config=config)


Concepts = Annotated[list[str], Parameter(help="What to erase.", negative_iterable=())]
Preserve = Annotated[list[str], Parameter(help="What to keep; repeat for more.", negative_iterable=())]
Anchor = Annotated[str | None, Parameter(help="What to draw instead; the method's own default if absent.")]
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
    preserve: Preserve = [],  # noqa: B006
    anchor: Anchor = None,
    preset: Preset = None,
): ...


def _erase(method, module, given, concepts, out, preserve, anchor, model, preset) -> None:
    _, edit = _fitted(module, given, concepts, preserve, anchor, model, preset)
    out.parent.mkdir(parents=True, exist_ok=True)
    edit.save(out)
    print(f"{out}: {edit.kind}, {edit.nbytes} bytes")


def _run(method, module, given, concepts, out, preserve, anchor, preset) -> None:
    model, edit = _fitted(module, given, concepts, preserve, anchor, "emoji", preset)
    result = world.measure(model, edit, progress=True)
    words = [method, *map(json.dumps, concepts)]
    for name, value in {"preserve": preserve, "anchor": anchor, "preset": preset, **given}.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None:
                words.append(
                    f"--{name.replace('_', '-')} {one if isinstance(one, (int, float)) else json.dumps(one)}"
                )
    line = f"python -m erasekit run {' '.join(words)} --out {out.as_posix()}"
    write_atomically(out, json.dumps({"command": line, **result}, indent=1) + "\n")
    before, after = (result[when]["target"]["rate"] for when in ("before", "after"))
    print(f"{out}: target {before:.1%} to {after:.1%}, others fall by {result['others_fall']:.1%}")


for _name in METHODS:
    erase.command(command(_name, _erase, _erase_parameters), name=_name)
    run.command(command(_name, _run, _run_parameters), name=_name)
