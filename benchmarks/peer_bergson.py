"""Runs in the peer's environment: Bergson's index of projected gradients and its Attributor, for tda_peers.

In its fastest right mode: through Python with the model in memory and batches of 50 texts. (Its command line refuses a
batch of more tokens than the model reads at once, which is one text here.) "plain" compares gradients by inner
products; "hessian" takes a second pass for their second moments, a block for each layer, and preconditions the query
with its default damping of a tenth of the mean eigenvalue.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_turns import Works, loaded, serve

BATCH = 50


def make(folder: str) -> Works:
    import torch
    from bergson import Attributor, CollectorComputer, GradientProcessor, IndexConfig, collect_gradients
    from bergson.data import allocate_batches
    from bergson.hessians.autocorrelation import AutocorrelationCollector
    from datasets import Dataset
    from torch.nn import functional

    model, _, task = loaded(folder)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)  # as its own loader does: else no gradient reaches a layer
    train, queries = (np.load(Path(folder) / f"{name}.npy") for name in ("train", "queries"))
    asked = torch.from_numpy(queries)
    length = train.shape[1]
    held: dict[str, Any] = {}

    def pass_over(where: Path) -> tuple[Any, IndexConfig, list[list[int]]]:
        data = Dataset.from_dict({"input_ids": train.tolist(), "length": [length] * len(train)})
        config = IndexConfig(run_path=str(where), projection_dim=task["size"], token_batch_size=BATCH * length)
        config.partial_run_path.mkdir(parents=True, exist_ok=True)
        return data, config, allocate_batches([length] * len(train), BATCH * length)

    def works(name: str) -> Works:
        where = Path(folder) / f"bergson {name}"

        def build() -> Mapping[str, Any]:
            for old in Path(folder).glob(f"bergson {name}*"):
                shutil.rmtree(old)
            data, config, batches = pass_over(where)
            processor = GradientProcessor(projection_dim=task["size"])
            collect_gradients(model, data, processor, config, batches=batches)
            shutil.move(config.partial_run_path, where)
            hessian = None
            if name == "hessian":
                hessian = where / "hessian"
                data, config, batches = pass_over(hessian)
                collector = AutocorrelationCollector(
                    model=model.base_model, processor=GradientProcessor(projection_dim=task["size"]), data=data,
                    path=str(hessian),
                )  # fmt: skip
                CollectorComputer(
                    model, data, collector=collector, batches=batches, cfg=config
                ).run_with_collector_hooks("second moments")
            files = sum(f.stat().st_size for f in where.rglob("*") if f.is_file())
            held[name] = Attributor(where, device="cpu", hessian_path=hessian)
            stored = (where / "gradients.bin").stat().st_size
            return {"bytes": stored / len(train), "files": files / len(train)}

        def query() -> Mapping[str, Any]:
            with held[name].trace(model.base_model, None) as found:
                logits = model(asked, use_cache=False).logits[:, :-1]
                functional.cross_entropy(logits.flatten(0, 1), asked[:, 1:].flatten(), reduction="sum").backward()
            model.zero_grad()
            scores = torch.zeros(found.scores.shape)
            return {"scores": scores.scatter(1, found.indices, found.scores).numpy()}

        return {f"build {name}": build, f"query {name}": query}

    return {**works("plain"), **works("hessian")}


if __name__ == "__main__":
    from importlib.metadata import version

    serve(make, f"bergson {version('bergson')}")
