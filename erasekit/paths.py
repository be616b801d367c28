"""Where things are, and how files are written. Nothing else in the package builds a path or replaces a file."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
EMOJI = Path(os.environ.get("ERASEKIT_WORLD", DATA / "emoji"))  # no package holds it: a checkout does
EMOJI_MODEL = EMOJI / "model"
EMOJI_CLIP = EMOJI / "clip"
EMOJI_JUDGE = EMOJI / "judge.safetensors"
RESULTS = DATA / "results"
NOTEBOOKS = ROOT / "notebooks"
FIGURES = ROOT / "figures"
BUILD = ROOT / "build"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; it takes the place of `path` when the block ends without an error.

    A reader sees the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def named_safetensors(path: str | Path) -> Path:
    """ValueError for a path by whose end other tools would not know the format."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(
            f"tools know the format by the name: expected a path that ends in .safetensors, got {path}"
        )
    return Path(path)
