"""Where things are. Nothing else in the package builds a path."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
EMOJI = DATA / "emoji"
EMOJI_MODEL = EMOJI / "model"
EMOJI_CLIP = EMOJI / "clip"
EMOJI_JUDGE = EMOJI / "judge.safetensors"
RESULTS = DATA / "results"
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
BUILD = ROOT / "build"
