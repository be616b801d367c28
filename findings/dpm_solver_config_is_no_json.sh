#!/usr/bin/env bash
# The scheduler most pipelines draw with, saved by save_pretrained. Expected: scheduler_config.json is JSON, which any
# reader of pipeline folders (JavaScript, Rust, a web server) can parse. Seen: lambda_min_clipped is minus infinity by
# default and is written as the bare word -Infinity, which JSON (RFC 8259) does not have; Python's own json reads it, so
# nobody notices in diffusers. DDIM's and Euler's files, the control, are JSON. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy diffusers==0.42.1 orjson==3.11.4
cat > "$place/saved.py" <<'PY'
import sys
from pathlib import Path

import diffusers
import orjson

print(f"diffusers {diffusers.__version__}, orjson {orjson.__version__}; expected: every file is JSON")
names = ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE", "SASolver", "UniPCMultistep"]
found = {}
for name in names:
    cls = getattr(diffusers, f"{name}Scheduler")
    if getattr(cls, "_backends", None):
        continue
    folder = Path(sys.argv[1]) / name
    cls().save_pretrained(folder)
    text = (folder / "scheduler_config.json").read_bytes()
    try:
        orjson.loads(text)
        found[name] = "JSON"
    except orjson.JSONDecodeError as error:
        words = [line.strip() for line in text.decode().splitlines() if "Infinity" in line]
        found[name] = f"no JSON: {error}; {words}"
    print(f"{name:20} {found[name]}")
sys.exit(not (found["DDIM"] == found["EulerDiscrete"] == "JSON" != found["DPMSolverMultistep"]))
PY
"$place/env/bin/python" "$place/saved.py" "$place"
