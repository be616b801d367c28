#!/usr/bin/env bash
# McNemar's test compares two models, or two raters, on the same pictures by the pairs on which they differ. Expected: where
# no pair differs, nothing tells the two apart, p = 1. Seen in statsmodels with exact=False, which its page advises for
# large counts: p = 0, the strongest possible verdict, behind a RuntimeWarning; without the continuity correction nan. And
# where as many differ one way as the other, the correction takes 1 from |b - c| = 0 and squares it: a statistic of
# 1 / (b + c) in place of 0. The exact form has p = 1 in both. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check statsmodels==0.14.6 numpy==2.4.1 scipy==1.17.1 pandas==2.3.3
cat > "$place/equal.py" <<'PY'
import math
import sys
import warnings
from importlib.metadata import version

from statsmodels.stats.contingency_tables import mcnemar

warnings.simplefilter("ignore")
print(f"statsmodels {version('statsmodels')}, scipy {version('scipy')}; expected: p = 1 in every row")
found = {}
for name, table in {"never differ": [[30, 0], [0, 70]], "differ 5 and 5 times": [[30, 5], [5, 60]]}.items():
    for exact, correction in ((True, True), (False, True), (False, False)):
        one = mcnemar(table, exact=exact, correction=correction)
        found[name, exact, correction] = float(one.pvalue)
        print(f"{name:22} exact={exact!s:5} correction={correction!s:5}: statistic {one.statistic:.3g}, p = {one.pvalue:.3g}")
wrong = found["never differ", False, True] == 0 and math.isnan(found["never differ", False, False])
wrong &= 0.7 < found["differ 5 and 5 times", False, True] < 0.8
right = all(found[name, True, True] == 1 for name in ("never differ", "differ 5 and 5 times"))
sys.exit(not (wrong and right))
PY
"$place/env/bin/python" "$place/equal.py"
