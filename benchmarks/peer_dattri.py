"""Runs in the peer's environment: dattri's LoGRA, for tda_peers.

Random projections to 16 x 16 numbers a layer, eFIM, its own damping rule, everything in memory: what it puts on disk
needs memory that only a GPU's driver can pin. HF's Conv1D becomes nn.Linear, the one kind of layer it projects. Its
queries use the model's own loss (a mean), so its examples do too; the order of the scores is the same.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_turns import Works, lay_straight, loaded, serve

BATCH = 50


def make(folder: str) -> Works:
    import torch
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader

    folder = str(Path(folder).resolve())
    os.chdir(folder)  # it keeps the sizes of its batches in a file where it stands, and would take another model's
    Path("batch_metadata.json").unlink(missing_ok=True)
    model, _, task = loaded(folder)
    model.requires_grad_(True)
    model.config.use_cache = False
    lay_straight(model, task["layers"])

    def texts(name: str) -> Any:
        rows = torch.from_numpy(np.load(Path(folder) / f"{name}.npy"))
        return DataLoader([{"input_ids": r, "labels": r} for r in rows], batch_size=BATCH, shuffle=False)

    train, queries = texts("train"), texts("queries")

    def loss(model: Any, batch: Any, device: Any) -> Any:
        return model(**batch).loss

    held: dict[str, Any] = {}

    def build() -> Mapping[str, Any]:
        torch.manual_seed(0)
        attribution = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
        held["attributor"] = LoGraAttributor(
            attribution, layer_names=list(task["layers"]), hessian="eFIM", device="cpu", proj_dim=task["size"] ** 2,
            offload="none",
        )  # fmt: skip
        held["attributor"].cache(train)
        # Gradients, and the same preconditioned, in float32.
        return {"bytes": 2 * 4 * task["size"] ** 2 * len(task["layers"])}

    def query() -> Mapping[str, Any]:
        return {"scores": held["attributor"].attribute(train, queries).detach().numpy().T}

    return {"build logra": build, "query logra": query}


if __name__ == "__main__":
    from importlib.metadata import version

    serve(make, f"dattri {version('dattri')}")
