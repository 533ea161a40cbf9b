"""Change: a reversible edit of a model.

A method plans it (``DiffQuickFix().plan(model, "red -> blue")``); nothing of the model is touched by that, and the
Change says what it will do (``change.foreseen``). ``with change.on(model): ...`` edits the model for a while;
``change.apply`` and ``change.undo`` edit it in place. The matrices themselves are kept, as they were and as they shall
be, so that undo gives back the same bits, in memory and in files.

A Change fits the model that it was planned for, and that model with other Changes applied to it. Two that touch
different matrices come off in any order; one that was planned on top of another comes off first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .errors import ModelError, OutputError, PromptError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "whence/change/1"
FILE = "change.safetensors"
_APPLIED: WeakKeyDictionary[Any, list[Change]] = WeakKeyDictionary()
"""What is applied to each live model, in the order in which it was."""


@dataclass(frozen=True)
class Goal:
    """What shall be drawn as what: prompts with ``old`` as if they said ``new``. ``prompts``: examples that have
    ``old`` in them (none: what the model's world says, or the method's templates); ``keep``: what must stay as it is,
    each a phrase that can stand in the place of ``old`` (none: the other words of its kind, where the model names
    them).

    >>> Goal.of("red -> blue")
    Goal(old='red', new='blue', prompts=(), keep=())
    """

    old: str
    new: str
    prompts: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    @classmethod
    def of(cls, goal: Goal | str) -> Goal:
        """From ``"old -> new"``. Raises PromptError for anything else."""
        if isinstance(goal, Goal):
            return goal
        old, arrow, new = (part.strip() for part in goal.partition("->"))
        if not (old and arrow and new):
            raise PromptError(f"the change {goal!r}", "not two phrases with an arrow between", "'red -> blue'")
        if old.lower() == new.lower():
            raise PromptError(f"the change {goal!r}", "both are the same", "two phrases that differ")
        return cls(old, new)

    @property
    def options(self) -> tuple[str, ...]:
        """What ``new`` names: one phrase, or several with bars between ("red circle | blue circle")."""
        return tuple(part.strip() for part in self.new.split("|") if part.strip())

    def __str__(self) -> str:
        return f"{self.old} -> {self.new}"


@dataclass(frozen=True, eq=False)
class Change:
    """``before`` and ``after``: the edited matrices by name, "component.place.weight". ``foreseen``: for each matrix
    the share of the way that is left to go ("edit"), how far kept values move ("keep") and the size of the change
    ("size"). ``fingerprint``: of the model that it was planned for."""

    method: str
    goal: Goal
    settings: dict[str, Any]
    model_name: str
    fingerprint: str
    before: Mapping[str, Tensor] = field(repr=False)
    after: Mapping[str, Tensor] = field(repr=False)
    foreseen: tuple[dict[str, Any], ...] = ()
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """Its own name, 12 hex digits: a hash of what it does to which matrices."""
        found = hashlib.sha256(f"{self.method} {self.goal}".encode())
        for name in sorted(self.before):
            found.update(name.encode() + _bits(self.before[name]) + _bits(self.after[name]))
        return found.hexdigest()[:12]

    @property
    def parameters(self) -> int:
        """How many numbers it sets."""
        return sum(t.numel() for t in self.after.values())

    @property
    def extent(self) -> str:
        """How much it edits, in words."""
        n = len(self.before)
        return f"{n} {'matrix' if n == 1 else 'matrices'}, {self.parameters:,} numbers"

    @property
    def predicted(self) -> dict[str, float]:
        """Means of ``foreseen`` over the matrices."""
        rows = self.foreseen or ({"edit": 0.0, "keep": 0.0, "size": 0.0},)
        return {k: round(sum(r[k] for r in rows) / len(rows), 4) for k in ("edit", "keep", "size")}

    # In memory ----------------------------------------------------------------------------------------------------

    @contextmanager
    def on(self, model: Any) -> Iterator[Any]:
        """The model is edited while inside; its own bits are back afterwards, whatever happened. Raises ModelError for
        another model."""
        self.apply(model)
        try:
            yield model
        finally:
            _write(self._weights(model), self.before)
            _applied(model).remove(self)

    def apply(self, model: Any) -> None:
        """Edit the model in place. Raises ModelError for another model, or one whose matrices have changed since."""
        weights, asked = self._weights(model), f"the change {self.goal} on {model.name}"
        known = {model.fingerprint, *(c.fingerprint for c in _applied(model))}
        differ = [n for n in self.before if not _same(weights[n], self.before[n])]
        if self.fingerprint not in known:
            raise ModelError(
                asked, f"it was made for {self.model_name} {self.fingerprint}, this is {model.fingerprint}",
                "the model that it was planned for; or plan it anew for this one",
            )  # fmt: skip
        if differ:
            others = [str(c.goal) for c in _applied(model) if set(c.after) & set(differ)]
            by = f"the change {' and '.join(others)}" if others else "something else"
            raise ModelError(asked, f"{by} edited {differ[0]} since", "undo that first, or plan this one on top of it")
        _write(weights, self.after)
        _applied(model).append(self)

    def undo(self, model: Any) -> None:
        """Give the edited model its own bits back. Raises ModelError where this Change is not what its matrices
        hold."""
        weights, asked = self._weights(model), f"undo the change {self.goal} on {model.name}"
        differ = [n for n in self.after if not _same(weights[n], self.after[n])]
        if differ:
            later = [str(c.goal) for c in _applied(model) if c is not self and set(c.after) & set(differ)]
            found = f"{differ[0]} does not hold what this change wrote" + (f"; on top: {later[-1]}" if later else "")
            raise ModelError(asked, found, "undo the last change first" if later else "the model that has this change")
        _write(weights, self.before)
        _applied(model)[:] = [c for c in _applied(model) if c is not self]

    def _weights(self, model: Any) -> dict[str, Tensor]:
        """The live tensors that this edits, by name."""
        found = {}
        for name in self.before:
            component, _, place = name.partition(".")
            owner: Any = getattr(getattr(model, "pipeline", None), component, None)
            for part in place.split(".")[:-1]:
                owner = getattr(owner, part, None)
            owner = getattr(owner, "base_layer", owner)
            weight = getattr(owner, place.rpartition(".")[2], None)
            if weight is None or weight.shape != self.before[name].shape or weight.dtype != self.before[name].dtype:
                what = "none" if weight is None else f"one of {tuple(weight.shape)} {weight.dtype}"
                raise ModelError(
                    f"the change {self.goal} on {model.name}",
                    f"it was made for {self.model_name} {self.fingerprint}, this is {model.fingerprint}: of "
                    f"{name} it has {what}",
                    "the model that it was planned for, in the same precision",
                )
            found[name] = weight
        return found

    # On disk ------------------------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> Path:
        """One safetensors file: ``before/NAME`` and ``after/NAME`` of each matrix, what else is known as metadata. A
        path without the ending is a folder for ``change.safetensors``. Raises OutputError."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        path = path if path.suffix == ".safetensors" else path / FILE
        both = (("before", self.before), ("after", self.after))
        tensors = {f"{when}/{n}": t.detach().cpu().contiguous() for when, own in both for n, t in own.items()}
        fresh = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, fresh, {"whence": json.dumps(self.record(), sort_keys=True)})
            os.replace(fresh, path)
        except (OSError, SafetensorError) as error:
            found = getattr(error, "strerror", None) or str(error)
            raise OutputError(f"save the change {path}", found, "a folder of yours, with room in it") from None
        finally:
            with suppress(OSError):
                fresh.unlink()
        return path

    @classmethod
    def load(cls, path: Path | str) -> Change:
        """A Change that :meth:`save` wrote: its file or its folder. Raises ModelError."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        path = path / FILE if path.is_dir() else path
        asked = f"the change {path}"
        try:
            with safe_open(path, "pt") as file:
                told = json.loads((file.metadata() or {})["whence"])
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118, it is no dict
            if told["schema"] != SCHEMA:
                raise ModelError(asked, f"its schema is {told['schema']}", SCHEMA)
            own = {k: told[k] for k in ("method", "settings", "model_name", "fingerprint", "seconds")}
            said = told["goal"]
            goal = Goal(said["old"], said["new"], tuple(said["prompts"]), tuple(said["keep"]))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            found = "no such file" if isinstance(error, FileNotFoundError) else f"no change that can be read: {error}"
            raise ModelError(asked, found, f"the folder or the {FILE} that `whence edit -o` wrote") from None
        before, after = (
            {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(when)} for when in ("before/", "after/")
        )
        change = cls(**own, goal=goal, before=before, after=after, foreseen=tuple(told["foreseen"]))
        if change.key != told["key"]:
            raise ModelError(asked, "its matrices are not those that were saved", "the file as it was written")
        return change

    def record(self) -> dict[str, Any]:
        """The JSON record, without matrices."""
        return {
            "schema": SCHEMA, "key": self.key, "method": self.method, "goal": asdict(self.goal),
            "settings": self.settings, "model_name": self.model_name, "fingerprint": self.fingerprint,
            "matrices": len(self.before), "parameters": self.parameters, "predicted": self.predicted,
            "foreseen": list(self.foreseen), "seconds": round(self.seconds, 4),
        }  # fmt: skip

    def entry(self, did: str, fingerprint: str) -> dict[str, Any]:
        """A line of a ledger: what was done, and the model's fingerprint after it."""
        told = self.record()
        told["goal"] = str(self.goal)
        return {"did": did, "after": fingerprint, "names": sorted(self.before)} | {
            k: told[k] for k in ("key", "method", "goal", "fingerprint", "predicted")
        }

    def __str__(self) -> str:
        p = self.predicted
        return (
            f"{self.goal} by {self.method}: {self.extent} of "
            f"{self.model_name} ({self.fingerprint}), planned in {self.seconds:.2f} s\n"
            f"foreseen: {1 - p['edit']:.0%} of the way there, kept values move by {p['keep']:.1%}"
        )


def _applied(model: Any) -> list[Change]:
    return _APPLIED.setdefault(model, [])


def _bits(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _same(a: Tensor, b: Tensor) -> bool:
    """The same bits: equal numbers would not tell -0 from 0, nor one NaN from another."""
    return a.shape == b.shape and a.dtype == b.dtype and _bits(a) == _bits(b)


def _write(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])
