"""What `whence index` and `whence query` speak of: a model, the loss of its examples, and the examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError, nearest

if TYPE_CHECKING:
    from ..objective import Examples, Objective

WORLDS = ("emoji", "facts", "shapes")
"""Embedded models; each has its training set."""
SOME = 480
"""Scenes of `shapes` that are indexed unless --limit says otherwise: there are 24,000, and no two days alike."""


@dataclass(frozen=True)
class Subject:
    """``about`` says how to make it again: it stands in the index."""

    adapter: Any
    objective: Objective
    examples: Examples
    about: dict[str, Any]

    @property
    def writes(self) -> bool:
        """Whether the model writes texts (others make pictures)."""
        return hasattr(self.adapter, "write")


@dataclass(frozen=True)
class Some:
    """An even share of a training set."""

    whole: Any
    limit: int

    def _place(self, number: int) -> int:
        return round(number * (len(self.whole) - 1) / max(self.limit - 1, 1))

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, number: int, /) -> Any:
        return self.whole[self._place(number)]

    def label(self, number: int) -> str:
        return str(self.whole.label(self._place(number)))

    def fingerprint(self) -> str:
        return f"{self.whole.fingerprint()}-{self.limit}"


def subject(about: Mapping[str, Any]) -> Subject:
    """Load the model and open the training set. Raises RunError, ModelError before any work."""
    model, data, world = about["model"], about.get("data"), about.get("world")
    limit, timesteps, length = about.get("limit"), about.get("timesteps") or 10, about.get("length") or 512
    if world is None and data is None and model in WORLDS:
        world = model
    if (world is None) == (data is None):
        found = "neither" if world is None else "both"
        raise RunError(
            "a training set", f"DATA and --world: {found} given", "whence index MODEL DATA, or --world shapes"
        )
    if world is not None and world not in WORLDS:
        raise RunError(f"the training set of the world {world!r}", "no such world", nearest(world, WORLDS))
    if timesteps < 1 or length < 2:
        raise RunError(f"--timesteps {timesteps}, --length {length}", "nothing to learn from", "1, and 2, or more")
    if data is not None and not Path(str(data)).exists():
        from ..models.datasets import FORMS

        raise RunError(f"the training set {data}", "no such file or folder", FORMS)
    adapter, objective = _model(model, timesteps, length)
    examples: Any = _of_world(world) if world else _of_files(Path(str(data)), adapter)
    if world == "shapes" and limit is None:
        limit = SOME
    if limit is not None:
        if limit < 1:
            raise RunError(f"--limit {limit}", "nothing to index", "1 or more")
        examples = Some(examples, min(limit, len(examples)))
    said = {"model": str(model), "data": None if data is None else str(data), "world": world, "limit": limit,
            "timesteps": timesteps, "length": length, "checkpoints": list(about.get("checkpoints") or ())}  # fmt: skip
    return Subject(adapter, objective, examples, said)


def _model(model: str, timesteps: int, length: int) -> tuple[Any, Objective]:
    from ..models.objectives import DiffusionObjective, LanguageObjective
    from ..models.text_loading import is_text_model
    from ..verbs import load, load_text

    if model == "facts" or is_text_model(model):
        text = load_text(model)
        return text, LanguageObjective(text, length, cut=True)
    adapter = load(model)
    return adapter, DiffusionObjective(adapter, timesteps)


def _of_world(world: str) -> Any:
    from importlib import import_module

    return import_module(f"whence.worlds.{world}.training_set").training_set()


def _of_files(path: Path, adapter: Any) -> Any:
    from ..models.datasets import PictureFolder, examples_from

    found: Any = examples_from(path)
    pictures = (
        isinstance(found, PictureFolder) or not isinstance(found[0], str | tuple) or hasattr(found[0][1], "shape")
    )
    if pictures == hasattr(adapter, "write"):
        kinds = ("texts", "captioned pictures")
        raise RunError(
            f"{path} as the training set of {adapter.name}", f"it holds {kinds[pictures]}", f"{kinds[not pictures]}"
        )
    if isinstance(found, PictureFolder) and found.size is None:
        found = PictureFolder(path, adapter.default_size[0])
    return found
