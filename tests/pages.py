"""Tables of the documentation, for the tests that hold them against committed results."""

from erasekit.paths import ROOT


def table(page: str, first: str) -> list[list[str]]:
    """The cells of the Markdown table on that page of the repository whose head begins with this text: the head, then
    the rows.
    """
    below = (ROOT / page).read_text().partition(f"\n| {first} |")[2].partition("\n\n")[0]
    assert below, f"no table in {page} begins with {first}"
    head, _, *rows = f"| {first} |{below}".splitlines()
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in (head, *rows)]
