#!/usr/bin/env bash
# A CLIPTextModel saved by transformers 5.23 and read by 4.56: every weight is drawn at random, with a warning only.
# Expected: the same hidden states, or an error. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
for pins in "new transformers==5.23.0" "old transformers==4.56.2"; do
    set -- $pins
    python3 -m venv "$place/$1"
    "$place/$1/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy "$2"
done
cat > "$place/write.py" <<'PY'
import sys

import torch
from transformers import CLIPTextConfig, CLIPTextModel

torch.manual_seed(0)
small = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = CLIPTextModel(CLIPTextConfig(**small, max_position_embeddings=8, eos_token_id=49)).eval()
ids = torch.tensor([[1, 2, 3, 49]])
with torch.no_grad():
    torch.save(model(ids).last_hidden_state, sys.argv[1] + "/states.pt")
model.save_pretrained(sys.argv[1] + "/model")
PY
cat > "$place/read.py" <<'PY'
import sys

import torch
import transformers
from transformers import CLIPTextModel

model = CLIPTextModel.from_pretrained(sys.argv[1] + "/model").eval()
with torch.no_grad():
    found = model(torch.tensor([[1, 2, 3, 49]])).last_hidden_state
wanted = torch.load(sys.argv[1] + "/states.pt", weights_only=True)
print(f"transformers {transformers.__version__}: hidden states differ by {float((found - wanted).abs().max()):.4f}")
sys.exit(0 if (found - wanted).abs().max() < 1e-4 else 3)
PY
"$place/new/bin/python" -W ignore "$place/write.py" "$place" 2>/dev/null
echo "expected: a difference of 0 in both versions"
"$place/new/bin/python" -W ignore "$place/read.py" "$place" 2>/dev/null
status=0
"$place/old/bin/python" -W ignore "$place/read.py" "$place" 2>/dev/null || status=$?
[ "$status" -eq 3 ]  # read without an error, and not what was saved
