"""The command line: `python -m erasekit generate | erase | run | notebooks`.

Bad input ends in one line on stderr and exit status 2; a failed notebook in exit status 1.
Heavy imports happen inside the commands, so that --help is quick.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from erasekit import notebooks as runner
from erasekit.paths import write_atomically

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A laboratory for concept erasure in text-to-image diffusion models.",
)
notebooks_app = typer.Typer(no_args_is_help=True, help="Run, refresh and check the notebooks.")
app.add_typer(notebooks_app, name="notebooks")

Model = Annotated[str, typer.Option(help="'emoji', a hub id, or a diffusers folder.")]
Names = Annotated[
    list[str] | None, typer.Argument(help="Names or numbers (10_uce or 10); all when left out.")
]
Jobs = Annotated[int, typer.Option(help="Notebooks run at once; they share the cores.")]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, OSError) as error:  # what the package raises for bad input and bad files
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        typer.echo("error: " + " ".join(str(text).split()), err=True)
        raise typer.Exit(2) from None


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help='For example "a church in flat style".')],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("picture.png"),
    seed: int = 0,
    model: Model = "emoji",
    edit: Annotated[Path | None, typer.Option(help="An edit to apply, written by erase.")] = None,
    steps: int = 25,
    guidance: float = 3.0,
) -> None:
    """Draw one picture from a prompt, with or without an edit."""
    with _one_line_errors():
        import erasekit as ek

        loaded_edit = ek.Edit.load(edit) if edit else None
        loaded_model = ek.load(model)
        with loaded_edit.applied(loaded_model) if loaded_edit else nullcontext():
            picture = loaded_model.generate([prompt], seeds=[seed], steps=steps, guidance=guidance)[0]
        out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(out)
        typer.echo(out)


@app.command()
def erase(
    method: Annotated[str, typer.Argument(help="uce, rece, ...")],
    concepts: Annotated[list[str], typer.Argument(help="What to erase.")],
    out: Annotated[Path, typer.Option(help="The edit to write (safetensors).")],
    preserve: Annotated[list[str] | None, typer.Option(help="What to keep; repeat for more.")] = None,
    anchor: Annotated[
        str | None, typer.Option(help="What to draw instead; the method's own default if absent.")
    ] = None,
    model: Model = "emoji",
) -> None:
    """Erase concepts from a model and save the edit; the model itself is not changed."""
    with _one_line_errors():
        _, edit = _fitted(method, concepts, preserve, anchor, model)
        out.parent.mkdir(parents=True, exist_ok=True)
        edit.save(out)
        typer.echo(f"{out}: {edit.kind}, {edit.nbytes} bytes")


@app.command()
def run(
    method: Annotated[str, typer.Argument(help="uce, rece, ...")],
    concepts: Annotated[list[str], typer.Argument(help="What to erase.")],
    out: Annotated[Path, typer.Option(help="The result to write (JSON).")],
    preserve: Annotated[list[str] | None, typer.Option(help="What to keep; repeat for more.")] = None,
    anchor: Annotated[
        str | None, typer.Option(help="What to draw instead; the method's own default if absent.")
    ] = None,
) -> None:
    """Erase from the emoji model, draw its whole world before and after, and write the judge's rates."""
    with _one_line_errors():
        import json

        from erasekit.evaluate import world

        model, edit = _fitted(method, concepts, preserve, anchor, "emoji")
        result = world.measure(model, edit, progress=True)
        kept = "".join(f" --preserve {json.dumps(name)}" for name in preserve or ())
        named = " ".join(json.dumps(name) for name in concepts)
        anchored = f" --anchor {json.dumps(anchor)}" if anchor is not None else ""
        command = f"python -m erasekit run {method} {named}{kept}{anchored} --out {out.as_posix()}"
        write_atomically(out, json.dumps({"command": command, **result}, indent=1) + "\n")
        before, after = (result[when]["target"]["rate"] for when in ("before", "after"))
        typer.echo(f"{out}: target {before:.1%} to {after:.1%}, others fall by {result['others_fall']:.1%}")


def _fitted(method: str, concepts: list[str], preserve: list[str] | None, anchor: str | None, model: str):
    from erasekit.methods import METHODS

    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}")
    import erasekit as ek

    loaded = ek.load(model)
    return loaded, METHODS[method].fit(loaded, erase=concepts, preserve=preserve or (), anchor=anchor)


@notebooks_app.command("run")
def run_notebooks(
    names: Names = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--parameter", metavar="NAME=VALUE", help="Override a parameter; repeat for more."
        ),
    ] = None,
    jobs: Jobs = 1,
    force: Annotated[bool, typer.Option("--force", help="Run unchanged notebooks too.")] = False,
) -> None:
    """Execute notebooks into build/notebooks/ and redraw figures/; unchanged ones are skipped."""
    with _one_line_errors():
        paths = runner.find(names or ())
        defaults = {name: value for path in paths for name, value in runner.declared(path).items()}
        overrides = dict(runner.parse_override(text, defaults) for text in parameter or ())
        failures = runner.run_all(paths, overrides, jobs=jobs, force=force)
    raise typer.Exit(1 if failures else 0)


@notebooks_app.command("refresh")
def refresh_notebooks(names: Names = None, jobs: Jobs = 1) -> None:
    """Re-execute notebooks in place, with the outputs in the one form that is committed."""
    with _one_line_errors():
        failures = runner.refresh(runner.find(names or ()), jobs=jobs)
    raise typer.Exit(1 if failures else 0)


@notebooks_app.command("check")
def check_notebooks(names: Names = None) -> None:
    """Say what keeps notebooks from being committed: not executed, not canonical, missing figures, ..."""
    with _one_line_errors():
        paths = runner.find(names or ())
    found = [f"{path.stem}: {problem}" for path in paths for problem in runner.problems(path)]
    typer.echo("\n".join(found) if found else f"{len(paths)} notebooks are executed and canonical")
    raise typer.Exit(1 if found else 0)
