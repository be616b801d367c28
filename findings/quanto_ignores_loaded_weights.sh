#!/usr/bin/env bash
# load_state_dict(strict=False) of plain weights into a module that quanto has frozen: no key is reported as unexpected,
# and nothing changes. Expected: the new weights, or their names among the unexpected keys. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 optimum-quanto==0.2.7 ninja==1.13.2 numpy
"$place/env/bin/python" -W ignore - <<'PY'
import sys
from importlib.metadata import version

import torch
from optimum.quanto import freeze, qint8, quantize

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), torch.nn.ReLU(), torch.nn.Linear(16, 4, bias=False))
x = torch.randn(3, 16)
new = {"2.weight": torch.randn(4, 16)}
quantize(model, weights=qint8)
freeze(model)
before = model(x)
told = model.load_state_dict(new, strict=False)
moved = float((model(x) - before).abs().max())
print("optimum-quanto", version("optimum-quanto"), "torch", torch.__version__)
print("expected: another output, or unexpected_keys == ['2.weight']")
print(f"seen: unexpected_keys == {told.unexpected_keys}, the output moved by {moved}")
sys.exit(0 if not told.unexpected_keys and moved == 0 else 1)
PY
