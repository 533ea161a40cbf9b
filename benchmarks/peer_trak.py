"""Runs in the peer's environment: TRAK's features and scores of a language model, for tda_peers.

In its fastest right mode on a CPU: gradients by vmap, and its own projector with the whole projection in memory (by
default it draws the matrix anew, block by block, for each batch). The projection is smaller than the number of
examples: with a larger one and its default of no regularisation its kernel is singular. The output of a text is its
log-odds by the mean log-probability of its bytes, as in published work on TRAK for language models.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_turns import Works, loaded, serve

SIZE, BATCH = 512, 50


def make(folder: str) -> Works:
    import torch
    from torch.nn import functional
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    model, _, _ = loaded(folder)
    model.requires_grad_(True)
    model.config._attn_implementation = "eager"  # what vmap can take apart
    model.config.use_cache = False
    train, queries = (torch.from_numpy(np.load(Path(folder) / f"{name}.npy")) for name in ("train", "queries"))
    size = min(SIZE, len(train) // 2)
    where = Path(folder) / "trak"
    # The mask is given: to make its own the model looks at values, which vmap does not allow.
    length = train.shape[1]
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    fixed = {"use_cache": False, "attention_mask": causal, "position_ids": torch.arange(length)[None]}

    def mean(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        nats = functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        return -nats.view(len(rows), -1).mean(1)

    class Text(AbstractModelOutput):
        def __init__(self) -> None:
            """Nothing to keep."""

        @staticmethod
        def get_output(net: Any, weights: Any, buffers: Any, row: torch.Tensor) -> torch.Tensor:
            said = torch.func.functional_call(net, (weights, buffers), (row[None],), fixed).logits
            logp = mean(said, row[None])
            return (logp - torch.log1p(-torch.exp(logp))).sum()

        def get_out_to_loss_grad(self, net: Any, weights: Any, buffers: Any, batch: Any) -> torch.Tensor:
            with torch.no_grad():
                said = torch.func.functional_call(net, (weights, buffers), (batch[0],), fixed).logits
                return (1 - torch.exp(mean(said, batch[0])))[:, None]

    class Kept(BasicProjector):
        def free_memory(self) -> None:
            """The matrix stays: one that was freed after the build is missed by the first query."""

    held: dict[str, Any] = {}

    def build() -> Mapping[str, Any]:
        shutil.rmtree(where, ignore_errors=True)
        weights = sum(p.numel() for p in model.parameters())
        projector = Kept(
            grad_dim=weights, proj_dim=size, seed=0, proj_type=ProjectionType.rademacher, device="cpu",
            block_size=size, dtype=torch.float32,
        )  # fmt: skip
        traker = TRAKer(
            model=model, task=Text(), train_set_size=len(train), save_dir=str(where), device="cpu",
            projector=projector, use_half_precision=False, logging_level=40,
        )  # fmt: skip
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for part in train.split(BATCH):
            traker.featurize(batch=(part,), num_samples=len(part))
        traker.finalize_features()
        held["traker"], held["asked"] = traker, 0
        stored = sum(f.stat().st_size for f in where.rglob("*.mmap"))
        files = sum(f.stat().st_size for f in where.rglob("*") if f.is_file())
        return {"bytes": stored / len(train), "files": files / len(train)}

    def query() -> Mapping[str, Any]:
        traker = held["traker"]
        held["asked"] += 1
        name = f"asked{held['asked']}"
        traker.start_scoring_checkpoint(name, model.state_dict(), model_id=0, num_targets=len(queries))
        traker.score(batch=(queries,), num_samples=len(queries))
        return {"scores": np.array(traker.finalize_scores(exp_name=name)).T}

    return {"build trak": build, "query trak": query}


if __name__ == "__main__":
    from importlib.metadata import version

    serve(make, f"traker {version('traker')}")
