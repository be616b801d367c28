#!/usr/bin/env bash
# Pictures of one prompt are alike, so two erased models are often compared by a logistic regression with clusters: GEE, with
# its standard errors that are robust to what a prompt's pictures share. Expected: of 0 of 200 pictures beside 20 of 200 it
# says about what a test of counts says (Fisher's p is 1e-6), a little more carefully, or that there is no finite answer. Seen
# in statsmodels with the defaults of `GEE(...).fit()`: where one rate is 0 of n (and a good erasure leaves 0 of n) p is 0, or
# 0.96, or nan, by how many prompts the same counts are spread over; 6 of 100 beside none has p = 0. `converged` is
# True and there is no warning. The model has no finite estimate, the residuals of the side with 0 of n are rounding errors, and
# the robust errors are made of them. With 1 of n in place of 0 the same calls give p from 0.00002 to 0.05. Exits 1 if that
# changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check statsmodels==0.14.6 numpy==2.4.1 scipy==1.17.1 pandas==2.3.3
cat > "$place/zero.py" <<'PY'
import sys
import warnings
from importlib.metadata import version

import numpy as np
import statsmodels.api as sm
from scipy.stats import fisher_exact


def compared(k, other, n, prompts):
    """GEE's p of the difference of k and other of n pictures, the n spread evenly over the prompts."""
    seen = np.concatenate([np.arange(n) < k, np.arange(n) < other]).astype(float)
    prompt = np.tile(np.arange(n) % prompts, 2)
    design = sm.add_constant(np.repeat([0.0, 1.0], n))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fitted = sm.GEE(seen, design, groups=prompt, family=sm.families.Binomial()).fit()
    return fitted.pvalues[1], fitted.converged and not told


print(f"statsmodels {version('statsmodels')}; expected: GEE's p near Fisher's, or a warning")
wrong, right = [], []
for k, into in ((0, wrong), (1, right)):
    for other, n, prompts in ((6, 100, 10), (20, 200, 20), (20, 200, 40), (50, 200, 40), (50, 250, 50)):
        p, silent = compared(k, other, n, prompts)
        fisher = fisher_exact([[k, n - k], [other, n - other]]).pvalue
        into.append((silent, p, fisher))
        note = "converged, no warning" if silent else "warned"
        print(f"{k} and {other} of {n}, {prompts} prompts: GEE p = {p:.3g} ({note}), Fisher p = {fisher:.1g}")
far = all(silent and (np.isnan(p) or p > 0.5 or p < fisher / 1e9) for silent, p, fisher in wrong)
sys.exit(not (far and all(1e-6 < p < 0.1 for _, p, _ in right)))
PY
"$place/env/bin/python" "$place/zero.py"
