#!/usr/bin/env bash
# nbval compares a notebook's stored outputs with those of a new run. Expected: a figure is treated alike in all formats
# that matplotlib can show inline. Seen: PNG and JPEG are passed over, SVG is compared byte by byte. With matplotlib's
# own settings two runs of one cell never agree, since an SVG has new random ids and the time in each; with
# `svg.hashsalt` and no date they agree on one machine, until one drawn number differs in its last printed digit, as it
# does on another processor. A notebook that changes from PNG to SVG so fails its checks though nothing else has
# changed, and one whose PNG shows something else altogether passes them. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check nbval==0.11.0 pytest==9.2.0 matplotlib==3.11.2 \
    matplotlib-inline==0.2.2 ipykernel==7.4.0 nbclient==0.11.0 nbformat==5.11.1
cat > "$place/compare.py" <<'PY'
import subprocess
import sys
from importlib.metadata import version

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

print(", ".join(f"{name} {version(name)}" for name in ("nbval", "matplotlib", "matplotlib-inline")))
SET = """%matplotlib inline
import matplotlib.pyplot as plt
from matplotlib_inline.backend_inline import set_matplotlib_formats
"""
FIXED = SET + "plt.rcParams['svg.hashsalt'] = 'any'\nset_matplotlib_formats('svg', metadata={'Date': None})"
DRAW = "lines = plt.plot([0, 1], [0, 1])"
found = {}
for name, how, later in (
    ("PNG, the same again", SET + "set_matplotlib_formats('png')", DRAW),
    ("PNG of something else", SET + "set_matplotlib_formats('png')", DRAW.replace("[0, 1])", "[1, 0])")),
    ("SVG, the same again", SET + "set_matplotlib_formats('svg')", DRAW),
    ("SVG, salted and undated, the same again", FIXED, DRAW),
    ("SVG, salted and undated, a millionth of the axis off", FIXED, DRAW.replace("[0, 1])", "[0, 1 + 1e-6])")),
):
    path = f"{sys.argv[1]}/figure.ipynb"
    notebook = new_notebook(cells=[new_code_cell(how), new_code_cell(DRAW)])
    NotebookClient(notebook, kernel_name="python3").execute()
    notebook.cells[-1].source = later  # the stored output is of the first source, the run of this one
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", path]
    found[name] = subprocess.run(command, capture_output=True).returncode == 0
    print(f"{name:55} {'passes' if found[name] else 'fails'}")
print("expected: both formats pass in the same cases")
sys.exit(list(found.values()) != [True, True, False, True, False])
PY
MPLBACKEND=module://matplotlib_inline.backend_inline "$place/env/bin/python" "$place/compare.py" "$place" 2> "$place/errors" || { cat "$place/errors"; exit 1; }
