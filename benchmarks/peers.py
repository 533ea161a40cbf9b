"""Peers live in virtual environments of their own, made here: .venvs/NAME at the root of the repository.

Our torch, diffusers and transformers are seen through a path file, so that both sides run the same kernels; the peer
goes in without its pins where these no longer install together.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What the package imports beside the libraries of ours; then the package, without its pins (they hold a
# huggingface_hub that lacks a function their diffusers needs).
PEERS = {
    "daam": (("spacy", "matplotlib", "pandas", "nltk", "ftfy"), "daam==0.2.0"),
    # None of these brings torchvision: its wheel does not match a CPU's torch, and transformers would not load then.
    "trak": ((), "traker==0.3.2"),
    "kronfluence": (("einops", "einconv", "opt-einsum"), "kronfluence==1.0.1"),
    "bergson": (
        ("datasets", "jaxtyping", "ml_dtypes", "natsort", "petname", "simple-parsing", "torchopt"), "bergson==2.5.1",
    ),
    "dattri": (("pyyaml", "pretty_midi"), "dattri==0.3.0"),
    "logix": (("einops", "pyyaml"), "logix-ai==0.1.1"),
}  # fmt: skip


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment, made on first use."""
    parts, package = PEERS[name]
    home = ROOT / ".venvs" / name
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, stdout=sys.stderr)
        (site,) = (home / "lib").glob("*/site-packages")
        (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if parts:
            subprocess.run([*pip, *parts], check=True, stdout=sys.stderr)
        subprocess.run([*pip, "--no-deps", package], check=True, stdout=sys.stderr)
        (home / "ready").touch()
    return python
