"""Runs in the peer's environment: Kronfluence's EK-FAC factors and pairwise scores, for tda_peers.

The loss is summed over the bytes of a text, targets are drawn from the model (its default), damping is its rule of a
tenth of the mean eigenvalue: the paper's, where the default of 1e-8 leaves small eigenvalues as they are. Nothing is
kept of an example: a query takes the gradients of all examples anew. HF's Conv1D becomes nn.Linear, as in its examples.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_turns import Works, lay_straight, loaded, serve

BATCH = 100


def make(folder: str) -> Works:
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.nn import functional
    from torch.utils.data import Dataset

    model, _, task = loaded(folder)
    model.requires_grad_(True)
    lay_straight(model, task["layers"])

    class Texts(Dataset):  # type: ignore[type-arg]
        def __init__(self, name: str) -> None:
            self.rows = torch.from_numpy(np.load(Path(folder) / f"{name}.npy"))

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, number: int) -> torch.Tensor:
            return self.rows[number]

    class Summed(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            if sample:
                with torch.no_grad():
                    target = torch.multinomial(logits.softmax(-1), 1).flatten()
            else:
                target = batch[:, 1:].flatten()
            return functional.cross_entropy(logits, target, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(task["layers"])

    train, queries = Texts("train"), Texts("queries")
    where = Path(folder) / "kronfluence"
    ready = prepare_model(model, Summed())
    held: dict[str, Any] = {}

    def build() -> Mapping[str, Any]:
        shutil.rmtree(where, ignore_errors=True)
        torch.manual_seed(0)
        held["analyzer"] = Analyzer(
            "one", ready, Summed(), cpu=True, disable_tqdm=True, output_dir=str(where), log_level=40
        )
        held["analyzer"].fit_all_factors(
            "ekfac", train, per_device_batch_size=BATCH, factor_args=FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )  # fmt: skip
        files = sum(f.stat().st_size for f in where.rglob("*") if f.is_file())
        return {"bytes": 0, "files": files / len(train)}

    def query() -> Mapping[str, Any]:
        found = held["analyzer"].compute_pairwise_scores(
            "asked", "ekfac", queries, train, per_device_query_batch_size=len(queries),
            per_device_train_batch_size=BATCH, score_args=ScoreArguments(damping_factor=None),
            overwrite_output_dir=True,
        )  # fmt: skip
        found = found or held["analyzer"].load_pairwise_scores("asked")
        return {"scores": found["all_modules"].numpy()}

    return {"build ekfac": build, "query ekfac": query}


if __name__ == "__main__":
    from importlib.metadata import version

    serve(make, f"kronfluence {version('kronfluence')}")
