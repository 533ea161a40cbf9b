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
PEERS = {"daam": (("spacy", "matplotlib", "pandas", "nltk", "ftfy"), "daam==0.2.0")}


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
        subprocess.run([*pip, *parts], check=True, stdout=sys.stderr)
        subprocess.run([*pip, "--no-deps", package], check=True, stdout=sys.stderr)
        (home / "ready").touch()
    return python
