"""What four papers claim, and whether the committed results agree: `data/papers/claims.csv`.

    table = tested()        # a row for each claim: both counts, their difference, a verdict

A claim is one sentence with where it stands in the paper and how far our copy of that can be trusted. Its test is two
cells of `data/results/`, A and B, and which of the two rates the paper says is higher. The list was written when most
of these results were already committed: it is **no pre-registration**. Tests were chosen by what a paper says.

A cell is written `files | edit | measure`: names of result files with spaces between, whose counts are added up. A
fourth part names a step or a protocol where the three fit several measurements. A semicolon adds a further cell.
"""

import functools

import pandas as pd

from erasekit.evaluate import metrics, records
from erasekit.evaluate.published import FOLDER
from erasekit.paths import RESULTS

AGREES, DIFFERS, UNSEEN, OPEN = "agrees", "differs", "no difference seen", "not measured"
VERDICTS = (AGREES, DIFFERS, UNSEEN, OPEN)
LEVEL = 0.05  # of Holm's adjusted p, over all claims together


def listed() -> pd.DataFrame:
    """`data/papers/claims.csv`: paper, claim, source, trust, a, b (cells; empty: nothing committed tests it), a_is,
    b_is (a word for each), expected ("lower" or "higher": A's rate beside B's), note (what stands for what, and what is
    no clean test).
    """
    return pd.read_csv(FOLDER / "claims.csv", keep_default_na=False)


def parts(cells: str) -> list[tuple[str, str, str, str]]:
    """(file, edit, measure, step or protocol) of each measurement that cells name, "" where there is no fourth.

    ValueError for a cell that is not written as the module says.
    """
    found = []
    for cell in cells.split(";"):
        files, *rest = [part.strip() for part in cell.split("|")]
        if not files or not 2 <= len(rest) <= 3:
            raise ValueError(f"a cell is 'files | edit | measure' and perhaps '| step', got {cell!r}")
        edit, measure, step = [*rest, ""][:3]
        found += [(file, edit, measure, step) for file in files.split()]
    return found


@functools.cache
def _read(file: str, folder) -> records.Result:
    if not (folder / f"{file}.json").exists():
        raise ValueError(f"a cell names {file!r}, and there is no {folder / file}.json")
    return records.read(file, folder)


def values(cells: str, folder=RESULTS) -> list[dict]:
    """The value of each measurement that cells name. ValueError for one that is not there, or there more than once."""
    found = []
    for file, edit, measure, step in parts(cells):
        rows = [m for m in _read(file, folder).measurements if (m.edit, m.measure) == (edit, measure)]
        rows = [m for m in rows if step in ("", m.step, m.protocol)]
        if len(rows) != 1:
            there = ", ".join(dict.fromkeys(m.edit for m in _read(file, folder).measurements))
            raise ValueError(
                f"{len(rows)} measurements of {measure!r} of {edit!r} in {file}; edits there: {there}"
            )
        found.append(rows[0].value)
    return found


def counted(cells: str, folder=RESULTS) -> dict:
    """The counts that cells name, added up, as `metrics.rate`. ValueError where one of them has no counts."""
    found = values(cells, folder)
    if not all("k" in one for one in found):
        raise ValueError(f"counts are needed, and {cells!r} has a mean or a distance")
    return metrics.rate(sum(one["k"] for one in found), sum(one["n"] for one in found))


def verdict(difference: float, p: float, expected: str) -> str:
    """One of `VERDICTS`. difference: A - B. p: adjusted. expected: "lower" or "higher"."""
    if expected not in ("lower", "higher"):
        raise ValueError(f"expected is 'lower' or 'higher', got {expected!r}")
    if p > LEVEL or difference == 0:
        return UNSEEN
    return AGREES if (difference < 0) == (expected == "lower") else DIFFERS


def _in_pairs(a: str, b: str, folder) -> dict:
    """A - B in pairs of prompt and seed. ValueError where one side has several measures."""
    sides, measures = [], []
    for cells in (b, a):
        named = parts(cells)
        if len(of := {measure for _, _, measure, _ in named}) != 1:
            raise ValueError(f"the cells of one side have one measure, {cells!r} has {', '.join(sorted(of))}")
        sides.append([records.about(_read(file, folder), edit) for file, edit, *_ in named])
        measures += of
    # a claim may be about two attacks
    more = {"attacks_differ": True, "resamples": metrics.MANY, "beside": measures[1]}
    found = records.paired(*sides, measures[0], **more)
    return {key: found[key] for key in ("difference", "low", "high", "p")}


def tested(claims: pd.DataFrame | None = None, folder=RESULTS) -> pd.DataFrame:
    """Each claim with its test: the columns of `listed`, k_a, n_a, k_b, n_b, difference (of the rates, A - B), low and
    high (95 %), p, holm (adjusted over all claims that are tested) and verdict, one of `VERDICTS`.

    In pairs, prompts and seeds resampled (`records.paired`): ValueError for a file that does not keep the verdict of
    each picture, or where both sides are not of the same pictures. claims: in place of `listed`.
    """
    claims = listed() if claims is None else claims
    found = []
    for one in claims.itertuples(index=False):
        if not one.a and not one.b:
            found.append({})
            continue
        a, b = (counted(cells, folder) for cells in (one.a, one.b))
        counts = {"k_a": a["k"], "n_a": a["n"], "k_b": b["k"], "n_b": b["n"]}
        found.append(counts | _in_pairs(one.a, one.b, folder))
    columns = ["k_a", "n_a", "k_b", "n_b", "difference", "low", "high", "p"]
    table = claims.join(pd.DataFrame(found, columns=columns, index=claims.index))
    table = table.astype(dict.fromkeys(columns[:4], "Int64"))
    measured = table["p"].notna()
    table.loc[measured, "holm"] = metrics.holm(table.loc[measured, "p"]) if measured.any() else []
    table["verdict"] = [
        verdict(one.difference, one.holm, one.expected) if pd.notna(one.p) else OPEN
        for one in table.itertuples()
    ]
    return table
