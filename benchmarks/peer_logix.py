"""Runs in the peer's environment: LogIX's LoGRA, for tda_peers.

It asks for a Python before 3.11 and is installed without regard to that. Random projections to 16 x 16 numbers a layer,
the raw second moments, its own damping rule. HF's Conv1D becomes nn.Linear, as its hooks want.
"""

import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_turns import Works, lay_straight, loaded, serve

BATCH = 50


def make(folder: str) -> Works:
    import torch
    from logix import LogIX, LogIXScheduler
    from torch.nn import functional

    folder = str(Path(folder).resolve())
    os.chdir(folder)  # it leaves a file where it stands
    model, _, task = loaded(folder)
    model.requires_grad_(True)
    lay_straight(model, task["layers"])
    train, queries = (torch.from_numpy(np.load(Path(folder) / f"{name}.npy")) for name in ("train", "queries"))
    where = Path(folder) / "logix"
    settings = Path(folder) / "logix.yaml"
    settings.write_text(f"root_dir: {where}\nlora:\n  init: random\n  rank: {task['size']}\n")
    held: dict[str, Any] = {}

    def back(net: Any, rows: torch.Tensor) -> None:
        net.zero_grad()
        logits = net(rows, use_cache=False).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").backward()

    def build() -> Mapping[str, Any]:
        shutil.rmtree(where, ignore_errors=True)
        torch.manual_seed(0)
        net, run = deepcopy(model), LogIX("one", str(settings))
        run.watch(net, name_filter=list(task["layers"]))
        for _ in LogIXScheduler(run, lora="random", hessian="raw", save="grad"):
            for at in range(0, len(train), BATCH):
                part = train[at : at + BATCH]
                with run(data_id=[str(at + i) for i in range(len(part))]):
                    back(net, part)
            run.finalize()
        run.eval()
        held["run"], held["net"] = run, net
        held["loader"] = run.build_log_dataloader(batch_size=64)
        files = [f for f in where.rglob("*") if f.is_file()]
        rows = sum(f.stat().st_size for f in files if "log" in f.name)
        return {"bytes": rows / len(train), "files": sum(f.stat().st_size for f in files) / len(train)}

    def query() -> Mapping[str, Any]:
        run = held["run"]
        with run(data_id=[f"query {i}" for i in range(len(queries))]):
            back(held["net"], queries)
        found = run.compute_influence_all(run.get_log(), held["loader"])
        scores = np.zeros((len(queries), len(train)), np.float32)
        scores[:, [int(i) for i in found["tgt_ids"]]] = found["influence"].numpy()
        return {"scores": scores}

    return {"build logra": build, "query logra": query}


if __name__ == "__main__":
    from importlib.metadata import version

    serve(make, f"logix-ai {version('logix-ai')}")
