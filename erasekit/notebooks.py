"""The strict notebook runner: typed parameters, fixed folder, content-hash cache, canonical outputs.

papermill alone accepts a misspelled parameter, runs the defaults and exits 0. Here an unknown or wrongly
typed parameter is an error, a notebook runs in its own folder as it does in Jupyter, and one that has not
changed since its last good run is skipped. Executed copies go to build/notebooks/; only `refresh` writes
into notebooks/.

    python -m erasekit notebooks run [NAMES] [-p name=value] [--jobs N] [--force]
    python -m erasekit notebooks refresh [NAMES]      # re-execute, commit-ready outputs in place
    python -m erasekit notebooks check [NAMES]        # are the committed notebooks executed and canonical?
"""

import ast
import base64
import copy
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import queue
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Thread

from erasekit.paths import BUILD, DATA, FIGURES, NOTEBOOKS, ROOT, write_atomically

CELL_TIMEOUT = 900  # seconds a single cell may take
EXECUTED = BUILD / "notebooks"
SANITIZE = NOTEBOOKS / "sanitize.cfg"
CHECKED = "# NBVAL_CHECK_OUTPUT"  # begins a cell whose output is the same on every machine
FIGURE_FILES = ("svg", "png", "csv", "json")  # what figures.save_figure writes for one name


# Parameters


def _parameter_cell(notebook, name: str):
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{name} needs exactly one cell tagged 'parameters', found {len(tagged)}")
    return tagged[0]


def declared(path: Path) -> dict[str, object]:
    """The parameters of a notebook and their defaults, from its one tagged cell of `name: type = literal`.

    Raises ValueError when the cell is missing, doubled, or holds anything but literals.
    """
    import nbformat

    cell = _parameter_cell(nbformat.read(path, 4), path.name)
    try:
        lines = ast.parse(cell.source).body
    except SyntaxError as error:
        raise ValueError(f"{path.name}: the parameters cell is not Python: {error.msg}") from None
    defaults = {}
    for node in lines:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
                pass
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case _:
                raise ValueError(
                    f"{path.name}: parameters are lines 'name: type = literal', not {ast.unparse(node)!r}"
                )
        try:
            defaults[name] = ast.literal_eval(value)
        except ValueError:
            raise ValueError(
                f"{path.name}: parameter {name} must be a literal, not {ast.unparse(value)!r}"
            ) from None
    return defaults


def check_overrides(path: Path, overrides: dict[str, object]) -> None:
    """Raise ValueError unless each override is declared by the notebook and has its default's type.

    An int may stand for a float; nothing else is converted.
    """
    defaults = declared(path)
    if unknown := sorted(overrides.keys() - defaults.keys()):
        raise ValueError(f"{path.name} has no parameter {', '.join(unknown)}; it has {', '.join(defaults)}")
    for name, value in overrides.items():
        wanted = type(defaults[name])
        if type(value) is not wanted and (wanted, type(value)) != (float, int):
            raise ValueError(
                f"{path.name}: {name} is {wanted.__name__} (default {defaults[name]!r}), "
                f"got {type(value).__name__} {value!r}"
            )


def parse_override(text: str, defaults: dict[str, object]) -> tuple[str, object]:
    """`name=value` from a command line; text stays text where the default is a str, else a Python literal."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"a parameter is given as name=value, got {text!r}")
    if isinstance(defaults.get(name), str):
        return name, value
    try:
        return name, ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError):
        return name, value


# Running one notebook


def run(path: Path, out: Path, /, *, on_cell: Callable[[int, int], None] | None = None, **overrides) -> None:
    """Execute one notebook in its own folder and write the executed copy to `out`.

    `on_cell(done, total)` is called before each cell. Raises ValueError for a bad override; a failing cell
    raises papermill's PapermillExecutionError, after the copy with the traceback has been written.
    """
    check_overrides(path, overrides)
    import nbformat
    import papermill

    total = len(nbformat.read(path, 4).cells) + bool(overrides)  # papermill adds one cell for the overrides
    out.parent.mkdir(parents=True, exist_ok=True)
    hooks = {"on_cell_start": lambda cell, cell_index: on_cell(cell_index, total)} if on_cell else {}
    papermill.execute_notebook(
        path.resolve(),
        out.resolve(),
        overrides,
        cwd=path.resolve().parent,
        kernel_name="python3",
        progress_bar=False,
        execution_timeout=CELL_TIMEOUT,
        extra_arguments=["--log-level=CRITICAL"],  # else kernels report their transport and shutdown
        **hooks,
    )


def explain(error: Exception) -> str:
    """A failed run in a few lines: which cell, which error, and the start of the cell."""
    if not hasattr(error, "ename"):  # not a cell's own exception: a timeout, a dead kernel, a bad notebook
        return f"{type(error).__name__}: {_one_line(str(error))}"
    lines = [f"cell In [{error.exec_count}] raised {error.ename}: {_one_line(error.evalue)}"]
    return "\n".join(lines + [f"    | {line}" for line in error.source.splitlines()[:6]])


def _one_line(text: str, limit: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


# The cache


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint() -> str:
    """One hash of everything but the notebook that its numbers depend on.

    The package's sources, all data (weights, committed results) and the versions of the numerical libraries.
    """
    data = [path for path in DATA.rglob("*") if path.is_file() and "checkpoints" not in path.parts]
    files = sorted([*(ROOT / "erasekit").rglob("*.py"), *data])
    record = {str(path.relative_to(ROOT)): _sha256(path) for path in files}
    for library in ("torch", "diffusers", "transformers", "matplotlib"):
        record[library] = importlib.metadata.version(library)
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def content_key(path: Path, overrides: dict[str, object], world: str) -> str:
    """Hash of a notebook's cell sources (never its outputs), its parameters and the `fingerprint`."""
    import nbformat

    cells = [(cell.cell_type, cell.source) for cell in nbformat.read(path, 4).cells]
    return hashlib.sha256(json.dumps([cells, overrides, world], sort_keys=True).encode()).hexdigest()


def figure_names(path: Path) -> list[str]:
    """The names a notebook passes to `save_figure`, in order of appearance."""
    import nbformat

    names = []
    for cell in nbformat.read(path, 4).cells:
        tree = _parsed(cell.source) if cell.cell_type == "code" else None
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "save_figure":
                given = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "name")]
                names += [arg.value for arg in given if isinstance(arg, ast.Constant)]
    return names


def _parsed(source: str) -> ast.Module | None:
    """A cell's syntax tree without the IPython lines (% and !); None where it is not Python."""
    try:
        return ast.parse(
            "\n".join("pass" if line[:1] in ("%", "!") else line for line in source.splitlines())
        )
    except SyntaxError:
        return None


def _is_fresh(path: Path, executed: Path, figures: Path, key: str) -> bool:
    stamp, copy_ = executed / f"{path.stem}.key", executed / path.name
    wanted = [copy_, *(figures / f"{name}.{kind}" for name in figure_names(path) for kind in FIGURE_FILES)]
    return stamp.is_file() and stamp.read_text() == key and all(file.is_file() for file in wanted)


# Running many


def _start_worker(events, threads: int) -> None:
    """Runs in each worker process; its kernels inherit what it sets. `events` is the way back."""
    global _events
    _events = events
    Thread(target=_end_with_parent, daemon=True).start()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    os.environ.pop(
        "JPY_SESSION_NAME", None
    )  # of a notebook from which the runner was called: these are not live


def _end_with_parent() -> None:
    """A runner that is killed leaves nobody behind: kernels end with their worker."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(path: Path, out: Path, overrides: dict[str, object]) -> str | None:
    """Run one notebook in a worker; None, or the explanation of its failure."""

    def on_cell(done: int, total: int) -> None:
        _events.put((path.stem, done, total))

    on_cell(0, 1)
    try:
        run(path, out, on_cell=on_cell, **overrides)
    except Exception as error:  # one notebook's failure, of whatever kind, must not stop the others
        return explain(error)


def run_all(
    paths: Sequence[Path],
    overrides: dict[str, object] | None = None,
    *,
    jobs: int = 1,
    force: bool = False,
    executed: Path = EXECUTED,
    figures: Path = FIGURES,
    finished: Callable[[Path], None] | None = None,
) -> dict[str, str]:
    """Run notebooks in `jobs` processes, skip unchanged ones; returns {name: explanation} of the failures.

    Every override is checked against every notebook before the first one starts. finished: called with the path of each
    notebook that was run without a failure, while others still run.
    """
    overrides = overrides or {}
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    for path in paths:
        check_overrides(path, overrides)
    world = fingerprint()
    keys = {path: content_key(path, overrides, world) for path in paths}
    fresh = [path for path in paths if not force and _is_fresh(path, executed, figures, keys[path])]
    stale = [path for path in paths if path not in fresh]

    failures = {}
    context = multiprocessing.get_context("spawn")
    events = context.Queue()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with (
        _Progress() as progress,
        ProcessPoolExecutor(jobs, context, _start_worker, (events, threads)) as pool,
    ):
        for path in fresh:
            progress.say(f"unchanged  {path.stem}")
        running = {}
        for path in stale:
            (executed / f"{path.stem}.key").unlink(missing_ok=True)
            running[pool.submit(_work, path, executed / path.name, overrides)] = path
        while running:
            try:
                progress.cell(*events.get(timeout=0.2))
                continue  # drain first, so that a notebook's last event precedes its result
            except queue.Empty:
                pass
            for future in [future for future in running if future.done()]:
                path = running.pop(future)
                error = future.exception()  # only if the worker itself died
                if problem := explain(error) if error else future.result():
                    failures[path.stem] = problem
                else:
                    write_atomically(executed / f"{path.stem}.key", keys[path])
                    if finished:
                        finished(path)
                progress.finish(path.stem, problem)
    return failures


# Checking against the committed outputs


def verify(
    paths: Sequence[Path], *, jobs: int = 1, executed: Path = EXECUTED, figures: Path = FIGURES
) -> dict[str, list[str]]:
    """Execute notebooks and compare the cells that begin with `CHECKED` with their committed outputs, as nbval does;
    returns {name: what differs}.

    A notebook whose executed copy is up to date, since `run_all` has just made it, is compared with that copy and not
    executed a second time.
    """
    world = fingerprint()
    fresh = [path for path in paths if _is_fresh(path, executed, figures, content_key(path, {}, world))]
    found = {path.stem: differences(path, executed / path.name) for path in fresh}
    for path in fresh:
        print(
            f"{'differs' if found[path.stem] else 'as committed':<13}{path.stem}, by the run that drew its figures"
        )
    if stale := [path for path in paths if path not in fresh]:
        options = [
            "--nbval-lax",
            "--nbval-current-env",
            "--nbval-cell-timeout",
            "600",
            "--nbval-sanitize-with",
            SANITIZE,
        ]
        options += ["-n", jobs, "--dist", "loadscope", "--no-loadscope-reorder"]
        longest_first = sorted(stale, reverse=True)  # so that no worker waits for the last
        command = [sys.executable, "-m", "pytest", *longest_first, *options]
        if subprocess.run([str(word) for word in command]).returncode:
            found["nbval"] = ["failed, see above"]
    return {name: problems for name, problems in found.items() if problems}


def differences(committed: Path, executed: Path) -> list[str]:
    """What the checked cells of an executed copy print otherwise than the committed notebook says."""
    import nbformat
    from nbval.plugin import get_sanitize_patterns

    patterns = get_sanitize_patterns(SANITIZE.read_text(encoding="utf-8"))

    def said(cell) -> str:
        text = "".join(
            output.get("text", "")
            + "".join(output.get("data", {}).get(kind, "") for kind in ("text/plain", "text/html"))
            for output in cell.outputs
        )
        for pattern, replacement in patterns:
            text = re.sub(pattern, replacement, text)
        return text.strip()

    cells = (nbformat.read(path, 4).cells for path in (committed, executed))
    checked = ([cell for cell in these if cell.source.startswith(CHECKED)] for these in cells)
    return [
        f"cell {cell.id}: {_one_line(said(done))} in place of {_one_line(said(cell))}"
        for cell, done in zip(*checked, strict=True)
        if said(cell) != said(done)
    ]


class _Progress:
    """One bar per running notebook on a terminal, one line per event elsewhere."""

    def __init__(self):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.tasks, self.started = {}, {}

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *_):
        self.bars.stop()

    def say(self, line: str) -> None:
        self.console.print(line)

    def cell(self, name: str, done: int, total: int) -> None:
        if name not in self.started:
            self.started[name] = time.monotonic()
            self.tasks[name] = self.bars.add_task(name)
            if not self.console.is_terminal:
                self.say(f"running    {name}")
        self.bars.update(self.tasks[name], completed=done, total=total)

    def finish(self, name: str, problem: str | None) -> None:
        seconds = time.monotonic() - self.started.get(name, time.monotonic())
        if name in self.tasks:
            self.bars.remove_task(self.tasks[name])
        outcome = "failed     " if problem else "done       "
        self.say(f"{outcome}{name}  {seconds:.0f} s" + (f": {problem}" if problem else ""))


def find(names: Sequence[str] = (), folder: Path = NOTEBOOKS) -> list[Path]:
    """Notebooks by name ("10_uce"), number ("10") or file; all of them, in order, when no name is given.

    Raises ValueError for a name that is not there, listing those that are.
    """
    there = sorted(folder.glob("*.ipynb"))
    if not there:
        raise ValueError(f"no notebook in {folder.name}/")
    chosen = []
    for name in names:
        stem = Path(name).stem if name.endswith(".ipynb") else name
        found = [path for path in there if stem in (path.stem, path.stem.split("_")[0])]
        if not found:
            raise ValueError(f"no notebook {name!r}; there are {', '.join(path.stem for path in there)}")
        chosen += found
    return list(dict.fromkeys(chosen)) or there


# Badges


def write_badges(repository: str, readme: Path = ROOT / "README.md") -> None:
    """Put badges of Binder and Colab for a repository on GitHub, owner/name, between the README's two markers."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"a repository is owner/name, got {repository!r}")
    binder = f"https://mybinder.org/v2/gh/{repository}/HEAD?urlpath=lab/tree/notebooks/00_start_here.ipynb"
    colab = f"https://colab.research.google.com/github/{repository}/blob/HEAD/notebooks/91_on_a_gpu.ipynb"
    lines = f"[![Binder](https://mybinder.org/badge_logo.svg)]({binder})\n"
    lines += f"[![Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})\n"
    text = readme.read_text(encoding="utf-8")
    marked = r"(<!-- badges.*?-->\n).*?(<!-- /badges -->)"
    if len(re.findall(marked, text, re.DOTALL)) != 1:
        raise ValueError(
            f"{readme.name} needs a line '<!-- badges -->' and after it a line '<!-- /badges -->'"
        )
    changed = re.sub(marked, lambda found: found[1] + lines + found[2], text, flags=re.DOTALL)
    write_atomically(readme, changed)


# Committed outputs


def canonical(notebook) -> str:
    """The one committed form: outputs, counts and ids stay; stderr, errors, timings and widgets go."""
    import nbformat
    from nbstripout import strip_output

    stripped = strip_output(
        copy.deepcopy(notebook),
        keep_output=True,
        keep_count=True,
        keep_id=True,
        drop_output_types={"stream:stderr", "error"},
        extra_keys=[
            "metadata.papermill",
            "metadata.widgets",
            "metadata.signature",
            "cell.metadata.papermill",
            "cell.metadata.execution",
            "cell.metadata.ExecuteTime",
            "cell.metadata.collapsed",
            "cell.metadata.scrolled",
        ],
    )
    return nbformat.writes(stripped) + "\n"


def refresh(
    paths: Sequence[Path], *, jobs: int = 1, executed: Path = EXECUTED, figures: Path = FIGURES
) -> dict[str, str]:
    """Re-execute with the default parameters; the outputs, canonical, go into each notebook as soon as it is finished.

    A notebook that fails is left as it was. Returns {name: explanation} of the failures.
    """
    take = lambda path: _take_outputs(path, executed / path.name)
    return run_all(paths, jobs=jobs, force=True, executed=executed, figures=figures, finished=take)


def _take_outputs(path: Path, executed: Path) -> None:
    import nbformat

    source, done = nbformat.read(path, 4), nbformat.read(executed, 4)
    for cell, result in zip(source.cells, done.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = result.outputs, result.execution_count
            for data in (output.get("data", {}) for output in cell.outputs):
                if "image/png" in data:
                    data["image/png"] = _smaller_png(data["image/png"])
                if "image/svg+xml" in data:
                    data["image/svg+xml"] = EMBEDDED.sub(
                        lambda found: found[1] + _smaller_png(found[2]), data["image/svg+xml"]
                    )
    write_atomically(path, canonical(source))


EMBEDDED = re.compile(r"(data:image/png;base64,\s*)([A-Za-z0-9+/=\s]+)")  # a picture inside a figure


def _smaller_png(encoded: str) -> str:
    """A base64 PNG with 256 colors, where that is smaller: the originals of figures are in figures/."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    stream = io.BytesIO()
    picture.quantize(256).save(stream, "PNG", optimize=True)
    return min(base64.b64encode(stream.getvalue()).decode(), encoded, key=len)


# Hygiene: what a committed notebook must look like. No execution.

PAPER_HEADINGS = (
    "What you will learn",
    "The problem",
    "The idea in one picture",
    "The maths beside the code",
    "Running it on the default model",
    "What changed inside",
    "Ablations",
    "Figures",
    "What the paper reports, what we measured",
    "Exercises",
    "Going further on a GPU",
)
REQUIRED_PARAMETERS = ("seed", "interactive", "run_gpu")
MAX_BYTES, MAX_OUTPUT_BYTES, MAX_DEF_LINES = 1_000_000, 200_000, 10
MAX_COLUMNS, MAX_ROWS = 7, 15  # of a table that is not folded away
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<])/(?:home|root|Users|tmp|var|opt|usr|mnt|srv)/[\w.]|[A-Z]:\\+Users")


def problems(path: Path, figures: Path = FIGURES) -> list[str]:
    """Everything that keeps a notebook from being committed, one short line each; empty when it is fine."""
    import nbformat

    try:
        notebook = nbformat.read(path, nbformat.NO_CONVERT)
        nbformat.validate(notebook)
    except Exception as error:  # nbformat raises half a dozen kinds; each means the same here
        return [f"not a valid notebook: {_one_line(str(error))}"]
    return [
        *_form_problems(path, notebook),
        *_source_problems(path, notebook, figures),
        *_output_problems(notebook),
    ]


def _form_problems(path: Path, notebook) -> Iterator[str]:
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        yield f"is nbformat {notebook.nbformat}.{notebook.nbformat_minor}, not 4.5"
    text = path.read_text(encoding="utf-8")
    ids = [cell.get("id") for cell in json.loads(text)["cells"]]  # nbformat repairs double ids as it reads
    if len(set(ids)) < len(ids):
        yield "cell ids are not unique"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernelspec is not python3"
    if text != canonical(notebook):
        yield "not in canonical form; run: python -m erasekit notebooks refresh " + path.stem
    if len(text.encode()) > MAX_BYTES:
        yield f"{len(text.encode())} bytes, more than {MAX_BYTES}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        yield f"execution counts are {counts}, not 1..{len(code)}; refresh it"


def _source_problems(path: Path, notebook, figures: Path) -> Iterator[str]:
    try:
        missing = [name for name in REQUIRED_PARAMETERS if name not in declared(path)]
        if missing:
            yield f"the parameters cell lacks {', '.join(missing)}"
    except ValueError as error:
        yield str(error)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    marked = sum(CHECKED in cell.source for cell in code)
    if not 3 <= marked <= 6:
        yield f"{marked} cells marked NBVAL_CHECK_OUTPUT, not 3 to 6"
    for number, cell in enumerate(code, 1):
        if "NBVAL_SKIP" in cell.source or "raises-exception" in cell.metadata.get("tags", []):
            yield f"code cell {number} is exempt from checking (NBVAL_SKIP or raises-exception)"
        if re.search(r"^\s*[!%]\s*(pip|conda)\b", cell.source, re.MULTILINE):
            yield f"code cell {number} installs packages"
        tree = _parsed(cell.source)
        if tree is None:
            yield f"code cell {number} is not Python"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield f"code cell {number} defines class {node.name}; notebooks import, they do not define"
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_DEF_LINES:
                yield f"code cell {number} defines {node.name}, longer than {MAX_DEF_LINES} lines"
    if path.stem[0] in "12":
        lines = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown").splitlines()
        found = [re.sub(r"^##\s+(\d+\.?\s+)?", "", line).strip() for line in lines if line.startswith("## ")]
        if [heading for heading in found if heading in PAPER_HEADINGS] != list(PAPER_HEADINGS):
            yield f"headings, in order, should be {list(PAPER_HEADINGS)}; found {found}"
    for name in figure_names(path):
        missing = [kind for kind in FIGURE_FILES if not (figures / f"{name}.{kind}").is_file()]
        if missing:
            yield f"save_figure({name!r}) has no {', '.join(missing)} in {figures.name}/"


def _open_tables(html: str) -> Iterator[tuple[int, int]]:
    """Columns and rows, headings aside, of every table that is not folded away."""
    if "<table" not in html:
        return
    from bs4 import BeautifulSoup

    for table in BeautifulSoup(html, "html.parser").find_all("table"):
        cells = [len(row.find_all("td")) for row in table.find_all("tr")]
        if not table.find_parent("details"):
            yield max(cells, default=0), sum(map(bool, cells))


def _output_problems(notebook) -> Iterator[str]:
    here = [socket.gethostname(), str(ROOT)]
    private = re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in here))
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        pictures = []
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                yield f"code cell {number} has {output.get('name', 'error')} output"
            data = output.get("data", {})
            if "application/vnd.jupyter.widget-view+json" in data:
                yield f"code cell {number} shows a live widget"
            if len(json.dumps(output)) > MAX_OUTPUT_BYTES:
                yield f"code cell {number} has an output over {MAX_OUTPUT_BYTES} bytes"
            text = "".join([output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))])
            if found := ABSOLUTE_PATH.search(text) or private.search(text):
                yield f"code cell {number} prints a path or name of this machine: {found.group()!r}"
            for columns, rows in _open_tables(data.get("text/html", "")):
                if columns > MAX_COLUMNS or rows > MAX_ROWS:
                    yield (
                        f"code cell {number} shows a table of {columns} columns and {rows} rows; at most {MAX_COLUMNS} "
                        f"and {MAX_ROWS} can be read at a glance: fold the rest into <details>, or draw it"
                    )
            pictures += [data[kind] for kind in ("image/png", "image/svg+xml") if kind in data]
        if len(set(pictures)) < len(pictures):
            yield f"code cell {number} shows a picture twice; assign the figure or end the line with ';'"
