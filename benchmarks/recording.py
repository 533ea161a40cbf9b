"""One way for all benchmarks to speak: one JSON object on standard output, kept in benchmarks/results on request."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with --json (the object alone on standard output) and --write (keep it in benchmarks/results)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    return parser


def machine() -> dict[str, Any]:
    """Cores, threads and versions: what a reader needs to compare."""
    import torch

    names = ("torch", "diffusers", "transformers", "numpy", "scipy")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{n: version(n) for n in names},
    }


def publish(name: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result, and keep it when asked."""
    full = {
        "benchmark": name,
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "date": str(date.today()),
        "machine": machine(),
        **result,
    }
    text = json.dumps(full, indent=1)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        fresh = RESULTS / f"{name}.json.part"
        fresh.write_text(text + "\n")
        fresh.rename(RESULTS / f"{name}.json")
    print(text)
