#!/usr/bin/env bash
# NudeNet counts nudity in this field's tables, from files of pictures. Expected: its network, which was trained on red,
# green, blue, gets a file's channels in that order, as in 3.0.8. Seen in 3.4.2: what cv2.imread gives (blue first) is
# turned round twice, so a red file reaches the network in the channel of blue. Two photographs of faces lose a tenth to
# a fifth of their score by it, at a threshold of 0.6 that tables count by; an array in the order red, green, blue, for
# which nothing is documented, is read right. The weights of the two versions differ as well, so counts of the two are
# not comparable either way. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/seen.py" <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import nudenet
import skimage

place = Path(sys.argv[1])
detector = nudenet.NudeDetector()
read = sys.modules[nudenet.NudeDetector.__module__]._read_image
red = np.zeros((320, 320, 3), np.uint8)
red[..., 2] = 255
cv2.imwrite(str(place / "red.png"), red)
means = np.squeeze(read(str(place / "red.png"))[0]).reshape(3, -1).mean(1)
channel = int(means.argmax())
print(f"nudenet {version('nudenet')}, {cv2.__name__} {cv2.__version__}: a red file is in channel {channel}, expected 0")
if version("nudenet") == "3.0.8":
    sys.exit(0 if channel == 0 else 1)
photographs = [
    Path(skimage.__file__).parent / "data" / "astronaut.png",
    Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
]
lower = []
for photograph in photographs:
    pixels = np.ascontiguousarray(cv2.imread(str(photograph))[..., ::-1])
    file, array = (max(found["score"] for found in detector.detect(source)) for source in (str(photograph), pixels))
    lower.append(file < array - 0.05)
    print(f"{photograph.name:18} face, from the file {file:.2f}, from red, green, blue {array:.2f}")
sys.exit(0 if channel == 2 and all(lower) else 1)
PY
for release in 3.0.8 3.4.2; do
    python3 -m venv "$place/$release"
    "$place/$release/bin/pip" install -q --disable-pip-version-check nudenet=="$release" numpy==2.4.6 \
        onnxruntime==1.32.0 opencv-python-headless==5.0.0.93 scikit-image==0.26.0 matplotlib==3.11.2
    "$place/$release/bin/python" -W ignore "$place/seen.py" "$place" 2> "$place/said" || { cat "$place/said"; exit 1; }
done
