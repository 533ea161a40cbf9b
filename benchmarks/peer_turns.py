"""Runs in every environment, ours too: a process that does named works when told to, and says what each took.

The parent writes one JSON line, {"work": NAME, "memory": bool, "out": PATH}; the process does the work, saves its
arrays and answers with one JSON line: processor seconds (user and system) and wall seconds, and with "memory" also
the highest resident size above rest, from the kernel's own record (VmHWM), in MiB.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Works = Mapping[str, Callable[[], Mapping[str, Any]]]


def loaded(folder: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model (float32, weights frozen), tokenizer and task of a folder that the benchmark wrote."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    with torch.inference_mode():
        model(torch.arange(8)[None])  # weights that a file only lends are in memory from here on
    return model, AutoTokenizer.from_pretrained(folder), task_of(folder)


def task_of(folder: str) -> dict[str, Any]:
    """Texts of the task: prompt, target, context, sentences, query."""
    found: dict[str, Any] = json.loads((Path(folder) / "task.json").read_text())
    return found


def lay_straight(model: Any, names: Iterable[str]) -> None:
    """Put a Linear in the place of these Conv1D, which peers do not know."""
    from torch import nn

    for name in names:
        parent, _, last = name.rpartition(".")
        lying = model.get_submodule(name)
        layer = nn.Linear(*lying.weight.shape)
        layer.weight.data, layer.bias.data = lying.weight.data.T.contiguous(), lying.bias.data
        setattr(model.get_submodule(parent), last, layer)


def serve(make: Callable[[str], Works], package: str) -> None:
    """Answer until the input ends. ``make(folder)`` gives the works; packages print, so our line keeps its own door."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    line = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    works = make(sys.argv[1])
    print(json.dumps({"ready": package}), file=line)
    for request in sys.stdin:
        asked = json.loads(request)
        try:
            print(json.dumps(_turn(works[asked["work"]], asked)), file=line)
        except Exception as error:  # a peer's failure is a result of the benchmark
            said = next(iter(str(error).splitlines()), "")
            print(json.dumps({"failed": f"{type(error).__name__}: {said}"}), file=line)


def _turn(work: Callable[[], Mapping[str, Any]], asked: Mapping[str, Any]) -> dict[str, float]:
    gc.collect()
    if asked["memory"]:
        rest = _at_rest()
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    spent: dict[str, float] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    if asked["memory"]:
        spent["mib"] = (_memory("VmHWM") - rest) / 1024
    np.savez(asked["out"], **{k: np.asarray(v) for k, v in found.items()})
    return spent


def _at_rest() -> int:
    """What is free goes back to the system, the record of the highest resident size starts anew; KiB resident."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(key + ":"):
            return int(row.split()[1])
    raise KeyError(key)
