"""`whence index`: one pass over a training set, and what any number of queries then need."""

from __future__ import annotations

import json as to_json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engine.crew import Workers
    from ..objective import Examples, Objective
    from ..store.training_index import Judged, TrainingIndex


@dataclass(frozen=True)
class Asked:
    """The options of the command as typed."""

    model: str
    data: Path | None
    world: str | None
    out: str
    form: str = "auto"
    size: int | None = None
    limit: int | None = None
    timesteps: int | None = None
    length: int | None = None
    layers: str | None = None
    batch: int = 16
    resume: bool = False
    ray: str | None = None
    checkpoints: Sequence[str] = ()


def index(asked: Asked, json: bool) -> None:
    """Build the index and say what it holds. Raises RunError, ModelError, OutputError."""
    from ..errors import RunError
    from ..store.checkpoints import places
    from ..store.training_index import Form, build
    from .training_set import subject

    form = Form.of(asked.form, asked.size)
    if asked.batch < 1:
        raise RunError(f"--batch {asked.batch}", "nothing at a time", "1 or more")
    about = {
        "model": asked.model, "data": None if asked.data is None else str(asked.data.resolve()),
        "world": asked.world, "limit": asked.limit, "timesteps": asked.timesteps, "length": asked.length,
        "checkpoints": list(asked.checkpoints),
    }  # fmt: skip
    workers = None if asked.ray is None else workers_of(asked.ray, about)
    it = subject(about)
    # One that cannot be loaded is refused before any work.
    others = [subject({**about, "model": m, "world": it.about["world"], "checkpoints": []}) for m in asked.checkpoints]
    layers = tuple(p.strip() for p in asked.layers.split(",")) if asked.layers else None
    began = time.monotonic()
    made = build(
        it.objective, it.examples, asked.out, form, layers, asked.resume, {"about": it.about}, asked.batch,
        workers=workers,
    )  # fmt: skip
    for also, place in zip(others, places(asked.out, 1 + len(others))[1:], strict=True):
        more = None if asked.ray is None else workers_of(asked.ray, also.about)
        with build(
            also.objective, also.examples, place, form, layers, asked.resume, {"about": also.about}, asked.batch,
            workers=more,
        ):  # fmt: skip
            print(f"{also.about['model']}: {place}", file=sys.stderr)
    with made:
        record = record_of(made, asked.out, time.monotonic() - began)
        print(to_json.dumps(record, indent=1) if json else asked.out)
        if not json:
            _say(made, record)


def workers_of(address: str, about: Mapping[str, Any]) -> Workers:
    """Workers of the Ray at ``address``, who load what ``about`` says. Raises RunError where there is none."""
    from ..engine.crew import Workers
    from .training_set import WORLDS

    model = str(about["model"])
    if model not in WORLDS and Path(model).exists():
        model = str(Path(model).resolve())  # a worker may stand in another folder
    return Workers.of(address, partial(loaded, {**about, "model": model}))


def loaded(about: Mapping[str, Any]) -> tuple[Objective, Examples]:
    """In a worker: the model and the examples."""
    from .training_set import subject

    it = subject(about)
    return it.objective, it.examples


def record_of(made: TrainingIndex, place: str, seconds: float) -> dict[str, Any]:
    """The JSON record of an index."""
    from dataclasses import asdict

    from ..store.training_index import judgement

    bank = made.fitted.bank
    return {
        "schema": "whence/index/1", "index": str(place), "examples": len(made.fitted.examples),
        "form": asdict(made.form),
        "bytes_per_example": made.bytes_per_example(), "bytes_shared": made.index.tensor_bytes,
        "layers": len(bank.layers), "coverage": round(bank.coverage, 4), "uncovered": list(bank.uncovered),
        "skipped": [made.fitted.examples.label(i) for i in made.fitted.skipped], "seconds": round(seconds, 1),
        "about": made.index.manifest.settings["about"],
        "agreement_with_ekfac": [asdict(j) for j in judgement(made.index)],
    }  # fmt: skip


def _say(made: TrainingIndex, record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..store.training_index import judgement

    console = Console(stderr=True, highlight=False)
    per = sum(made.bytes_per_example().values())
    console.print(
        f"{record['examples']} examples, {per} bytes each and {record['bytes_shared']:,} shared; "
        f"{record['coverage']:.0%} of the weights; {record['seconds']} s"
    )
    for note in made.fitted.notes:
        console.print(note, style="yellow")
    found = judgement(made.index)
    if found:
        console.print(curve(found, Table))
    sys.stderr.flush()


def curve(found: list[Judged], table: Any) -> Any:
    """The curve of quality against bytes, as a table."""
    rows = table(title="agreement with EK-FAC on a sample of the training set", title_justify="left")
    for name in ("form", "bytes per example", "NDCG@20", "Spearman"):
        rows.add_column(name, justify="left" if name == "form" else "right")
    for j in sorted(found, key=lambda j: j.bytes):
        rows.add_row(j.form, str(j.bytes), f"{j.ndcg:.2f}", f"{j.spearman:.2f}")
    return rows
