"""What papers report, beside what is measured here: the numbers in `data/papers/`, and a dossier of each paper.

    published.rates("advunlearn")      # every number known to us: protocol, source, trust
    published.dossier("advunlearn")    # its tables and figures, and what stands for each here

Numbers of different protocols are never compared: `figures.beside` draws the two side by side, each with its own axis.
"""

from html import escape

import pandas as pd

from erasekit.paths import DATA

FOLDER = DATA / "papers"
NOT_RATES = ("dossiers", "claims", "agreement")
PAPERS = ("uce", "esd", "mace", "rece", "realera", "trce", "advunlearn")
STATES = {
    "measured": "measured here",
    "analogue": "analogue here",
    "weights": "needs real weights",
    "open": "not measured here",
    "unknown": "not known to us",
}
TABLE = (
    "python -m erasekit notebooks run 90 -p run_gpu=True -p table={}"  # one of erasekit.experiments.tables
)


def rates(*papers: str) -> pd.DataFrame:
    """What papers report: paper, metric, method, value, unit, model, protocol, source, trust, and rate, the value as a
    share where its unit is %. Without a name the numbers of all papers.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.csv") if path.stem not in NOT_RATES)
    if missing := sorted(set(papers) - set(known)):
        raise ValueError(f"no numbers of {', '.join(missing)}; there are some of: {', '.join(known)}")
    tables = {name: pd.read_csv(FOLDER / f"{name}.csv") for name in papers or known}
    found = pd.concat(tables, names=["paper"]).reset_index("paper").reset_index(drop=True)
    found["rate"] = (found["value"] / 100).where(found["unit"] == "%")
    return found


def dossier(paper: str) -> pd.DataFrame:
    """Every table and figure of a paper that we know of, in the paper's order: item, shows, state (a key of `STATES`),
    figures (their names in `figures/`, with spaces between), command (what makes it with real weights) and note.

    paper: one of `PAPERS`.
    """
    if paper not in PAPERS:
        raise ValueError(f"no dossier of {paper!r}; there is one of: {', '.join(PAPERS)}")
    found = pd.read_csv(FOLDER / "dossiers.csv", keep_default_na=False)
    found["command"] = found["table"].map(lambda table: table and TABLE.format(table))
    return found[found["paper"] == paper].drop(columns=["paper", "table"]).reset_index(drop=True)


def citation(paper: str) -> str:
    """The BibTeX entry of a paper."""
    entries = (FOLDER / "papers.bib").read_text().split("\n\n")
    found = [entry.strip() for entry in entries if entry.partition("{")[2].startswith(f"{paper},")]
    if not found:
        raise ValueError(f"no entry for {paper!r} in {FOLDER / 'papers.bib'}")
    return found[0]


def page(paper: str) -> str:
    """The dossier as HTML for a notebook: what the paper has, what stands for it here, where; and how to cite it."""
    rows = []
    for one in dossier(paper).itertuples():
        where = [*one.figures.split(), one.command]
        code = "<br>".join(f"<code>{escape(name)}</code>" for name in where if name)
        words = "<br>".join(part for part in (escape(one.note), code) if part)
        cells = (f"<b>{escape(one.item)}</b>", escape(one.shows), escape(STATES[one.state]), words)
        rows.append("<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>")
    head = "".join(
        f'<th style="text-align:left">{name}</th>' for name in ("in the paper", "shows", "here", "where")
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    cite = f"<details><summary>Cite this</summary><pre>{escape(citation(paper))}</pre></details>"
    return table + cite
