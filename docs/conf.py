"""Sphinx settings. The repository is the source folder, so that a link means the same here and in the checkout.

Nothing is fetched and nothing executed: notebook pages show the outputs that are committed, and MathJax is one file of
a pinned package.
"""

import inspect
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import erasekit

DOCS = Path(__file__).parent

project = "erasekit"
author = project_copyright = "erasekit contributors"
version = release = erasekit.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/api/*.md",
    "docs/models.md",
    "docs/glossary.md",
    "notebooks/*.ipynb",
    "data/LICENSES.md",
    "data/emoji/LICENSES.md",
]
exclude_patterns = [".*", "build"]

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
highlight_language = "text"
maximum_signature_line_length = 100

html_theme = "furo"
html_title = "erasekit"
html_copy_source = False
html_show_sphinx = False
mathjax_path = "tex-svg-full.js"
html_static_path = [
    "style.css",
    str(Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax" / mathjax_path),
]
html_css_files = ["style.css"]


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("autodoc-skip-member", leave_out_imported)
    app.connect("autodoc-process-docstring", as_rst)
    app.connect("build-finished", add_index)


def add_contents(app, docname, source):
    """The README is the first page; the sidebar's contents are not for those who read it elsewhere."""
    if docname == root_doc:
        source[0] += "\n" + (DOCS / "contents.md").read_text(encoding="utf-8")


def add_index(app, exception):
    """A web server looks for index.html."""
    if exception is None and app.builder.format == "html":
        shutil.copyfile(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def leave_out_imported(app, what, name, obj, skip, options):
    """autodoc drops members of other packages too, but only after reading signatures that it may not understand."""
    return True if not str(getattr(obj, "__module__", project)).startswith(project) else None


def as_rst(app, what, name, obj, options, lines):
    """Docstrings are plain text: paragraphs with `code` and *emphasis*, and indented blocks, shown as they are.

    A parameter that a docstring explains ("lam: the ridge.") is set as code.
    """
    try:
        names = "|".join(inspect.signature(obj).parameters)
    except (TypeError, ValueError):  # a module or a property
        names = ""
    explained = re.compile(rf"(?:^|(?<=[.;] ))(?:{names})(?:, (?:{names}))*(?=: )" if names else "(?!)")
    result = []
    for indented, block in blocks(lines):
        if indented:
            result += ["::", "", *block, ""]
        else:
            text = explained.sub(lambda found: f"``{found[0].replace(', ', '``, ``')}``", " ".join(block))
            parts = re.split(r"(``.+?``|`[^`]+`|(?<!\w)\*\w+\*(?!\w))", text)
            result += ["".join((marked_up if i % 2 else literal)(part) for i, part in enumerate(parts)), ""]
    lines[:] = result


def blocks(lines):
    """(whether it is indented, its lines) of every paragraph and every run of indented lines."""
    block, code = [], False
    for line in lines:
        indented = line.startswith("    ")
        if block and (line and not indented if code else not line or indented):
            yield code, block
            block = []
        if line or block:
            code = code if block else indented
            block.append(line)
    if block:
        yield code, block


def literal(text):
    """Text without any markup."""
    return re.sub(r"([^\w\s]|_)", r"\\\1", text)


def marked_up(text):
    """Code as a link where it names something documented; emphasis as it is."""
    if re.fullmatch(r"`[A-Za-z_][\w.]*`", text):
        text = f":py:obj:{text}"
    elif text.startswith("`") and not text.startswith("``"):
        text = f"`{text}`"
    return rf"\ {text}\ "
