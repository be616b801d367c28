"""The runner and the command line, on tiny notebooks made here: strict, cached, and clear when they fail."""

import copy
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from erasekit import notebooks, widgets
from erasekit.paths import ROOT

PARAMETERS = """seed: int = 3  # for the noise
lam: float = 0.5
name: str = 'a=b # c'
live: bool = False
sizes: list = [1, 2]"""


def write_notebook(path, *sources, parameters=PARAMETERS):
    cells = [
        new_markdown_cell("# Tiny"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(new_code_cell, sources),
    ]
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


@pytest.fixture
def run_all(tmp_path, monkeypatch):
    """run_all into a temporary build folder; the hash of the repository is frozen: only notebooks change."""
    monkeypatch.setattr(notebooks, "fingerprint", lambda: "frozen")

    def call(paths, overrides=None, **options):
        return notebooks.run_all(paths, overrides, executed=tmp_path / "build", figures=tmp_path, **options)

    return call


def printed(path):
    return "".join(
        output.get("text", "")
        for cell in nbformat.read(path, 4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


# Parameters


def test_declared_reads_literals_that_papermill_misreads(folder):
    path = write_notebook(folder / "a.ipynb")
    assert notebooks.declared(path) == {
        "seed": 3,
        "lam": 0.5,
        "name": "a=b # c",
        "live": False,
        "sizes": [1, 2],
    }


@pytest.mark.parametrize(
    "parameters", ["seed: int = 1 + 1", "import os", "seed: int", "a, b = 1, 2", "x = seed", "x ="]
)
def test_declared_refuses_anything_but_literals(folder, parameters):
    with pytest.raises(ValueError, match=r"^a\.ipynb: (the )?parameter"):
        notebooks.declared(write_notebook(folder / "a.ipynb", parameters=parameters))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"sede": 3}, "has no parameter sede; it has seed, lam, name, live, sizes"),
        ({"seed": "3"}, "seed is int (default 3), got str '3'"),
        ({"seed": 3.0}, "seed is int"),
        ({"seed": True}, "seed is int (default 3), got bool True"),
        ({"live": 1}, "live is bool"),
        ({"lam": True}, "lam is float"),
        ({"sizes": "[1]"}, "sizes is list"),
    ],
)
def test_bad_override_is_refused_before_anything_runs(folder, overrides, message):
    path, out = write_notebook(folder / "a.ipynb"), folder / "out.ipynb"
    with pytest.raises(ValueError) as error:
        notebooks.run(path, out, **overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("seed=7", 7),
        ("lam=1", 1),
        ("lam=1e-3", 1e-3),
        ("live=true", True),
        ("live=False", False),
        ("name=7", "7"),
        ("name=x=y", "x=y"),
        ("sizes=[4, 5]", [4, 5]),
        ("seed=seven", "seven"),
    ],
)
def test_command_line_values_get_their_types(folder, text, expected):
    name, value = notebooks.parse_override(text, notebooks.declared(write_notebook(folder / "a.ipynb")))
    assert name == text.partition("=")[0] and value == expected and type(value) is type(expected)


@pytest.mark.parametrize("text", ["seed", "=3", "a b=3"])
def test_malformed_override(text):
    with pytest.raises(ValueError, match="name=value"):
        notebooks.parse_override(text, {"seed": 0})


# Execution and cache


def test_what_the_runner_executes_is_not_live_even_when_called_from_jupyterlab(
    folder, tmp_path, run_all, monkeypatch
):
    monkeypatch.setenv("JPY_SESSION_NAME", "/a/notebook.ipynb")
    assert widgets.live()
    path = write_notebook(folder / "a.ipynb", "import os; print(os.environ.get('JPY_SESSION_NAME'))")
    assert run_all([path]) == {}
    assert printed(tmp_path / "build" / "a.ipynb") == "None\n"


def test_run_overrides_and_works_in_the_notebooks_folder(folder, tmp_path):
    path = write_notebook(folder / "a.ipynb", "import os; print(seed, lam, os.path.basename(os.getcwd()))")
    before, cwd = path.read_bytes(), os.getcwd()
    seen = []
    notebooks.run(path, tmp_path / "deep" / "out.ipynb", seed=11, lam=2, on_cell=lambda *at: seen.append(at))
    assert printed(tmp_path / "deep" / "out.ipynb") == "11 2 notebooks\n"
    assert path.read_bytes() == before and os.getcwd() == cwd
    assert seen[-1] == (3, 4), "progress counts the cell papermill adds"


@pytest.mark.slow
def test_unchanged_is_skipped_and_every_kind_of_change_runs_again(folder, tmp_path, run_all, monkeypatch):
    # the notebook counts its own runs, and saves a "figure"
    source = (
        "with open('../runs', 'a') as file: print('x', file=file)\n"
        "from pathlib import Path\n"
        "def save_figure(fig, name): [Path(f'../{name}.{k}').touch() for k in 'svg png csv json'.split()]\n"
        "save_figure(None, 'curve')"
    )
    path = write_notebook(folder / "a.ipynb", source)

    def runs(*arguments, **options):
        before = (tmp_path / "runs").read_text().count("x") if (tmp_path / "runs").exists() else 0
        assert run_all([path], *arguments, **options) == {}
        return (tmp_path / "runs").read_text().count("x") - before

    assert runs() == 1
    assert runs() == 0, "nothing changed"
    executed = nbformat.read(tmp_path / "build" / "a.ipynb", 4)
    nbformat.write(executed, tmp_path / "kept.ipynb")

    notebook = nbformat.read(path, 4)
    notebook.cells[1].execution_count = 5
    nbformat.write(notebook, path)
    assert runs() == 0, "outputs and counts are not content"
    notebook.cells.append(new_code_cell("1 + 1"))
    nbformat.write(notebook, path)
    assert runs() == 1, "edited"
    assert runs({"seed": 4}) == 1, "other parameters"
    assert runs() == 1, "the figures on disk are those of the other parameters"
    (tmp_path / "curve.csv").unlink()
    assert runs() == 1, "a figure is missing"
    (tmp_path / "build" / "a.ipynb").unlink()
    assert runs() == 1, "the executed copy is missing"
    monkeypatch.setattr(notebooks, "fingerprint", lambda: "the weights changed")
    assert runs() == 1
    assert runs(force=True) == 1
    assert runs() == 0


RUNNER = """
import sys
from pathlib import Path
from erasekit import notebooks

if __name__ == "__main__":
    path, place = Path(sys.argv[1]), Path(sys.argv[2])
    notebooks.run_all([path], executed=place / "build", figures=place)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who is alive")
def test_a_killed_runner_leaves_nobody_behind(folder, tmp_path):
    """Its worker and the kernel end by themselves; the control: they were alive before."""
    source = (
        "import os, time\n"
        "from pathlib import Path\n"
        "Path('../who').write_text(f'{os.getpid()} {os.getppid()}')\n"
        "time.sleep(600)"
    )
    path = write_notebook(folder / "a.ipynb", source)
    (tmp_path / "runner.py").write_text(RUNNER)
    runner = subprocess.Popen([sys.executable, tmp_path / "runner.py", path, tmp_path], cwd=ROOT)
    wait_for(lambda: (tmp_path / "who").exists() and len((tmp_path / "who").read_text().split()) == 2)
    others = [int(one) for one in (tmp_path / "who").read_text().split()]
    assert all(map(alive, others))
    runner.kill()
    runner.wait()
    wait_for(lambda: not any(map(alive, others)))


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)


def test_fingerprint_follows_sources_and_data_but_not_checkpoints(tmp_path, monkeypatch):
    for name in ("erasekit/a.py", "data/weights", "data/emoji/checkpoints/step"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "DATA", tmp_path / "data")
    first = notebooks.fingerprint()
    (tmp_path / "data/emoji/checkpoints/step").write_text("2")
    assert notebooks.fingerprint() == first
    hashes = {first}
    for name in ("erasekit/a.py", "data/weights"):
        (tmp_path / name).write_text("2")
        hashes.add(notebooks.fingerprint())
    assert len(hashes) == 3


def test_a_failing_cell_is_reported_and_the_others_go_on(folder, tmp_path, run_all, capfd):
    bad = write_notebook(
        folder / "a_bad.ipynb", "x = 1", "y = 2\nassert x == y, 'one is not two'", "print('after')"
    )
    good = write_notebook(
        folder / "b_good.ipynb", "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    )
    failures = run_all([bad, good], jobs=2)
    assert failures == {
        "a_bad": "cell In [3] raised AssertionError: one is not two\n"
        "    | y = 2\n    | assert x == y, 'one is not two'"
    }
    assert printed(tmp_path / "build" / "b_good.ipynb") == f"threads {max(1, os.cpu_count() // 2)}\n"
    assert "after" not in printed(tmp_path / "build" / "a_bad.ipynb")
    lines = capfd.readouterr().out
    for line in ("running    a_bad", "failed     a_bad", "done       b_good"):
        assert line in lines, "plain lines where there is no terminal"
    assert run_all([bad, good]).keys() == {"a_bad"}, "a failure is not cached"
    assert "unchanged  b_good" in capfd.readouterr().out


def test_a_cell_that_hangs_is_stopped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "CELL_TIMEOUT", 2)
    path = write_notebook(folder / "a.ipynb", "import time; time.sleep(60)")
    with pytest.raises(Exception, match="(?i)time") as error:
        notebooks.run(path, tmp_path / "out.ipynb")
    assert "Timeout" in notebooks.explain(error.value) and "\n" not in notebooks.explain(error.value)


def test_refresh_writes_canonical_outputs_and_leaves_a_failing_notebook_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "fingerprint", lambda: "frozen")
    good = write_notebook(
        folder / "a.ipynb", "import sys; print('seen'); print('noise', file=sys.stderr)", "seed * 2"
    )
    bad = write_notebook(folder / "b.ipynb", "print('seen')", "1 / 0")
    before = bad.read_bytes()
    failures = notebooks.refresh([good, bad], jobs=2, executed=tmp_path / "build", figures=tmp_path)
    assert failures.keys() == {"b"} and bad.read_bytes() == before
    notebook = nbformat.read(good, 4)
    assert good.read_text() == notebooks.canonical(notebook)
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert printed(good) == "seen\n", "stderr is dropped"
    assert notebook.cells[-1].outputs[0].data["text/plain"] == "6"
    assert "papermill" not in good.read_text() and [cell.id for cell in notebook.cells][0] == "cell-0"
    first = good.read_bytes()
    notebooks.refresh([good], executed=tmp_path / "build", figures=tmp_path)
    assert good.read_bytes() == first, "refreshing twice changes nothing"


def test_refresh_keeps_what_is_finished_while_others_run(folder, tmp_path, monkeypatch):
    """An interrupted list loses nothing: the second notebook sees the first with its outputs."""
    monkeypatch.setattr(notebooks, "fingerprint", lambda: "frozen")
    first = write_notebook(folder / "a.ipynb", "print('seen')")
    look = f"[one.get('outputs') for one in nbformat.read({str(first)!r}, 4).cells]"
    second = write_notebook(folder / "b.ipynb", f"import time, nbformat; time.sleep(2); print({look})")
    assert printed(first) == ""
    notebooks.refresh([first, second], executed=tmp_path / "build", figures=tmp_path)
    assert "seen" in printed(second)


@pytest.fixture
def verify(tmp_path, monkeypatch):
    """verify beside `run_all`, and what pytest was called with."""
    called = []
    monkeypatch.setattr(notebooks, "fingerprint", lambda: "frozen")
    monkeypatch.setattr(
        notebooks.subprocess, "run",
        lambda command: called.append(command) or subprocess.CompletedProcess(command, 0),
    )  # fmt: skip
    return lambda *paths: (notebooks.verify(paths, executed=tmp_path / "build", figures=tmp_path), called)


def test_what_was_just_executed_is_compared_and_not_executed_again(folder, tmp_path, run_all, verify):
    source = f"{notebooks.CHECKED}\nprint('took 3 s, seed', seed)"
    path = write_notebook(folder / "a.ipynb", source, "print(id(object()))")
    assert run_all([path]) == {}
    executed = nbformat.read(tmp_path / "build" / "a.ipynb", 4)
    committed = nbformat.read(path, 4)
    for cell, done in zip(committed.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = copy.deepcopy(done.outputs)
    committed.cells[-1].outputs[0].text = "another address"  # not a checked cell
    committed.cells[-2].outputs[0].text = "took 40 s, seed 3\n"  # times are taken out
    nbformat.write(committed, path)
    assert verify(path) == ({}, [])
    committed.cells[-2].outputs[0].text = "took 3 s, seed 4\n"
    nbformat.write(committed, path)
    found, called = verify(path)
    assert list(found) == ["a"] and "seed 3" in found["a"][0] and "seed 4" in found["a"][0] and not called


def test_what_has_changed_since_is_given_to_nbval(folder, run_all, verify):
    path = write_notebook(folder / "a.ipynb", "1")
    other = write_notebook(folder / "b.ipynb", "2")
    assert run_all([path, other]) == {}
    changed = nbformat.read(path, 4)
    changed.cells.append(new_code_cell("3"))
    nbformat.write(changed, path)
    found, (command,) = verify(path, other)
    assert not found and str(path) in command and str(other) not in command and "--nbval-lax" in command


def test_a_figure_is_drawn_by_a_checked_cell_and_its_words_are_compared_but_not_its_strokes(folder, tmp_path):
    """Every machine rounds a picture otherwise. nbval passes over PNG and JPEG by itself, over SVG it does not."""
    path = write_notebook(
        folder / "a.ipynb",
        f"{notebooks.CHECKED}\nfrom IPython.display import SVG, display\nprint('a figure')\n"
        """display(SVG('<?xml version="1.0"?>\\n<svg xmlns="http://www.w3.org/2000/svg"><path d="M 0 1"/></svg>'))""",
    )
    notebooks.refresh([path], executed=tmp_path / "build", figures=tmp_path)
    committed = path.read_text()

    def found():
        return notebooks.verify([path], executed=tmp_path / "nowhere", figures=tmp_path)

    for old, new in (("M 0 1", "M 0 2"), ("a figure", "another figure")):
        assert committed.count(old) > 1, "the output stands before the source, which is changed"
        path.write_text(new.join(committed.rsplit(old, 1)))
        assert bool(found()) == (old != "M 0 1")


def test_badges_stand_between_the_readmes_markers_and_are_replaced(tmp_path):
    readme = tmp_path / "README.md"
    shutil.copyfile(ROOT / "README.md", readme)
    plain = readme.read_text()
    for repository in ("a-b/c.d", "e/f"):
        notebooks.write_badges(repository, readme)
        text = readme.read_text()
        assert text.count("mybinder.org/v2/gh/") == text.count("colab.research.google.com/github/") == 1
        assert f"gh/{repository}/HEAD?urlpath=lab/tree/notebooks/00_start_here.ipynb" in text
        assert [line for line in text.splitlines() if "badge" not in line] == [
            line for line in plain.splitlines() if "badge" not in line
        ]
    for name in ("00_start_here", "91_on_a_gpu"):
        assert f"notebooks/{name}.ipynb" in text and (ROOT / "notebooks" / f"{name}.ipynb").exists()
    with pytest.raises(ValueError, match="owner/name"):
        notebooks.write_badges("https://github.com/e/f", readme)
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="needs a line"):
        notebooks.write_badges("e/f", readme)


def test_find_by_name_number_and_file(folder):
    for name in ("00_start", "10_uce", "11_esd"):
        write_notebook(folder / f"{name}.ipynb")

    def found(*names):
        return [path.stem for path in notebooks.find(names, folder)]

    assert found() == ["00_start", "10_uce", "11_esd"]
    assert found("10") == found("10_uce") == found("notebooks/10_uce.ipynb") == ["10_uce"]
    with pytest.raises(ValueError, match="no notebook '1'; there are 00_start, 10_uce, 11_esd"):
        found("1")


# The command line, as a user meets it


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "erasekit", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def assert_one_clear_line(result, *parts):
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0] and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in errors[0]


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = (
        "import sys, io, contextlib; from erasekit.cli import main\n"
        "out = io.StringIO()\n"
        "with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        "assert 'notebooks' in out.getvalue() and 'licences' in out.getvalue()\n"
        "print(sorted({'torch', 'diffusers', 'papermill', 'matplotlib'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_unknown_method(tmp_path):
    result = command("erase", "no_such_method", "church", "--out", str(tmp_path / "x.safetensors"))
    assert_one_clear_line(result, "no_such_method", "uce")
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_edit_file(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b'\x40\0\0\0\0\0\0\0{"half')
    for name in ("none.safetensors", "cut.safetensors"):
        result = command(
            "generate", "a church", "--edit", str(tmp_path / name), "--out", str(tmp_path / "x.png")
        )
        assert_one_clear_line(result, name)
        assert not (tmp_path / "x.png").exists()


def test_unknown_model_folder(tmp_path):
    assert_one_clear_line(command("generate", "a church", "--model", str(tmp_path / "nowhere")), "nowhere")


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["no_such_notebook"], ["no notebook 'no_such_notebook'", "00_start"]),
        (["00", "-p", "no_such=1"], ["no parameter no_such", "seed"]),
        (["00", "-p", "seed=many"], ["seed is int", "'many'"]),
        (["00", "-p", "seed"], ["name=value"]),
        (["00", "--jobs", "0"], ["jobs must be at least 1"]),
    ],
)
def test_bad_notebook_arguments(folder, notebook_cli, arguments, parts):
    write_notebook(folder / "00_start.ipynb")
    result = notebook_cli("run", *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def test_failed_notebook_is_exit_status_1(folder, notebook_cli):
    write_notebook(folder / "00_bad.ipynb", "seed / 0")
    result = notebook_cli("run", "00", "-p", "seed=8")
    assert result.returncode == 1 and "ZeroDivisionError" in result.stdout
    assert notebook_cli("check", "00").returncode == 1


@pytest.fixture
def notebook_cli(folder, tmp_path, monkeypatch, capsys):
    """`python -m erasekit notebooks ...` on the temporary folder."""
    from erasekit.cli import main

    monkeypatch.setattr(notebooks, "fingerprint", lambda: "frozen")
    monkeypatch.setattr(notebooks.find, "__defaults__", ((), folder))
    monkeypatch.setitem(notebooks.run_all.__kwdefaults__, "executed", tmp_path / "build")

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["notebooks", *arguments])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, stopped.value.code, out, err)

    return call
