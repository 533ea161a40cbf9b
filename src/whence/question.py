"""Question: one output of a model, the units that may have caused it, and the ways to ask the model again.

Methods that work on any units (Shapley values, integrated gradients) take a Question; worlds and adapters make them.
A Question is either asked freely or through :class:`Metered`, which counts and limits what an explainer spends. What an
explainer commits to before the oracle speaks is an :class:`Answer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from .errors import BudgetError, MethodError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from .explanation import Explanation
    from .units import Units


class Question(Protocol):
    """One output and its units. Only ``units``, ``readout`` and ``ask`` are always there; ``capabilities`` names the
    rest: "gradients" (``inputs``, ``forward``, ``unit_of``, ``background``) and "attention" (``attention``).

    ``readout`` says what number is asked for. It is oriented so that a unit which made the output happen *lowers* the
    value when it is re-rendered, and its range is about 1: the difference of the probabilities of the observed outcome.
    """

    @property
    def units(self) -> Units: ...

    @property
    def readout(self) -> str: ...

    @property
    def capabilities(self) -> frozenset[str]: ...

    def ask(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """value[coalition] of the readout with the units of each coalition kept, keep[coalition, unit], and the others
        re-rendered: drawn anew from the world's own conditional, one draw per row (give a row twice for two draws)."""
        ...


class White(Question, Protocol):
    """A Question whose model can be differentiated (capability "gradients")."""

    @property
    def inputs(self) -> Tensor:
        """The observed input as a floating tensor, [1, ...]: features, token embeddings [1, token, width] or weights
        of the places that an edge may have [1, place]."""
        ...

    @property
    def unit_of(self) -> Tensor:
        """Which unit each entry of ``inputs`` belongs to: integers of the shape of ``inputs`` (captum's feature_mask);
        -1 for entries that belong to none."""
        ...

    def forward(self, inputs: Tensor) -> Tensor:
        """The readout of a batch of inputs, [batch, ...] -> [batch], differentiable."""
        ...

    def background(self, n: int) -> Tensor:
        """``n`` inputs drawn from the world, [n, ...]: baselines inside the distribution."""
        ...


class TextQuestion(Question, Protocol):
    """A Question about a text (capability "text"): its units are parts of a prompt, its target is some tokens of what
    a language model wrote, held fixed. ``capabilities`` names what else there is: "gradients" (see White; ``inputs``
    are the embeddings of prompt and target), "suppression", "embeddings", "levels", "logit parts", and "deterministic":
    the same row always gets the same value, so that asking it again is for nothing."""

    @property
    def removal(self) -> str:
        """How units that are not kept are removed: "drop" (their characters are cut out, and the rest is tokenised
        again), "replace" (drawn anew from the world), "mean" or "mask" (their tokens' embeddings replaced)."""

    def ask_tokens(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """logprob[coalition, token], in nats, of each target token after the prompt with the units of
        keep[coalition, unit] kept. The same row is asked of the model once."""
        ...

    def suppress(self, factor: NDArray[np.float64], how: str = "multiply") -> NDArray[np.float64]:
        """logprob[coalition, token] with the attention that every later token pays to each unit scaled by
        factor[coalition, unit] in all layers and heads: "multiply" scales the raw scores (AtMan), "bias" adds
        ln(factor) to them. Nothing is removed. Capability "suppression"."""
        ...

    def embeddings(self) -> NDArray[np.float64]:
        """Mean input embedding of each unit's tokens, [unit, width]. Capability "embeddings"."""
        ...

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels of the units, from this question's own to the finest. Capability "levels"."""

    def refine(self, units: Iterable[int]) -> TextQuestion:
        """The question whose units are the parts, one level down, of these units; all others are kept as they are.
        Raises MethodError at the finest level."""
        ...

    def over(self, start: int, stop: int) -> TextQuestion:
        """The same about the target tokens [start, stop) alone; what was measured is not measured again."""
        ...


@dataclass(frozen=True)
class Answer:
    """What an explainer commits to.

    ``scores[unit]``: how much each unit did, larger is more; in the readout's own units where ``nothing`` or the
    predicted effects are to count. ``sets``: the minimal sets of units that must be re-rendered together to end the
    outcome (either suffices: both in one set; both needed: two sets of one; None: the explainer speaks of single units
    only). ``interactions``: effect beyond the sum for a set re-rendered together.
    ``nothing``: "no unit here did it".
    """

    scores: NDArray[np.float64]
    sets: tuple[frozenset[int], ...] | None = None
    interactions: Mapping[frozenset[int], float] = field(default_factory=dict)
    nothing: bool = False

    def predict(self, removed: Iterable[int]) -> float:
        """By how much the value falls when these units are re-rendered together: the sum of their scores and of the
        interactions inside the set."""
        gone = frozenset(removed)
        inside = sum(v for s, v in self.interactions.items() if s <= gone)
        return 0.0 if self.nothing else float(sum(self.scores[i] for i in gone) + inside)

    @classmethod
    def of(cls, given: Any, units: Units) -> Answer:
        """From what an explainer returned: an Answer, an Explanation of these units, or one number per unit.

        Raises MethodError that says what is wrong with it: another length, numbers that are not finite, unknown units.
        """
        import numpy as np

        if isinstance(given, Answer):
            scores = cls._checked(given.scores, units)
            return cls(scores, *cls._groups(given.sets, given.interactions, len(units)), bool(given.nothing))
        if hasattr(given, "scores") and hasattr(given, "units"):
            return cls._of_explanation(given, units)
        try:
            scores = np.asarray(given, np.float64)
        except (TypeError, ValueError):
            raise MethodError(
                "an answer", f"a {type(given).__name__}", f"{len(units)} numbers, an Answer or an Explanation"
            ) from None
        return cls(cls._checked(scores, units))

    @classmethod
    def _of_explanation(cls, e: Explanation, units: Units) -> Answer:
        import numpy as np

        scores = np.zeros(len(units))
        for label, total in zip(e.units.labels, e.totals, strict=True):
            scores[units.find(label)] = total
        sets = e.details.get("sets")
        together = {frozenset(map(units.find, k)): float(v) for k, v in e.details.get("interactions", ())}
        return cls(
            cls._checked(scores, units),
            None if sets is None else tuple(frozenset(map(units.find, s)) for s in sets),
            together,
            bool(e.details.get("nothing", False)),
        )

    @staticmethod
    def _groups(
        sets: Any, interactions: Any, n: int
    ) -> tuple[tuple[frozenset[int], ...] | None, dict[frozenset[int], float]]:
        import math

        try:
            listed = None if sets is None else tuple(frozenset(map(int, s)) for s in sets)
            together = {frozenset(map(int, s)): float(v) for s, v in interactions.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise MethodError(
                "an answer", str(error), "sets of unit numbers, and {set: number} as interactions"
            ) from None
        for group in (*(listed or ()), *together):
            if not group or not all(0 <= i < n for i in group):
                raise MethodError(
                    "an answer", f"the set {sorted(group)}", f"sets of units from 0 to {n - 1}, not empty"
                )
        if not all(map(math.isfinite, together.values())):
            raise MethodError("an answer", "interactions that are not finite", "finite numbers")
        return listed, together

    @staticmethod
    def _checked(scores: Any, units: Units) -> NDArray[np.float64]:
        import numpy as np

        x = np.array(scores, np.float64)  # a copy: what was committed to stays as it was
        if x.shape != (len(units),):
            raise MethodError("an answer", f"scores of shape {x.shape}", f"one number for each of {len(units)} units")
        if not np.isfinite(x).all():
            raise MethodError("an answer", f"{int((~np.isfinite(x)).sum())} of {x.size} not finite", "finite numbers")
        return x


def top_of(scores: NDArray[np.float64], k: int) -> list[int]:
    """The units with the ``k`` highest scores. Raises MethodError where equal scores lie on both sides of the cut: the
    order that units happen to come in must not choose between them."""
    import numpy as np

    order = np.argsort(-scores, kind="stable")
    if k < len(order) and scores[order[k - 1]] == scores[order[k]]:
        raise MethodError(f"the {k} highest scores", "equal scores on both sides of the cut", "another number of units")
    return [int(i) for i in order[:k]]


Explainer = Callable[[Any], Any]
"""Anything that answers a Question: returns an Answer, an Explanation, or one number per unit."""


@dataclass
class Spent:
    """What was spent: rows sent forwards through the model, rows sent backwards, seconds."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Budget:
    """What may be spent on one question."""

    forwards: int = 2_000
    backwards: int = 500
    seconds: float = 60.0


def behind(question: Any) -> Any:
    """The question that a :class:`Metered` counts; any other is itself. For the trial, never for an explainer."""
    return question._question if isinstance(question, Metered) else question


class Metered:
    """A Question that counts. Each row of ``ask`` and ``forward`` is one forward, each row differentiated one backward.

    Beyond its budget it raises BudgetError. It shows an explainer nothing but the Question's own methods.
    """

    def __init__(self, question: Question, budget: Budget | None = None) -> None:
        self._question, self._budget, self._began = question, budget or Budget(), time.perf_counter()
        self._spent = Spent()

    @property
    def spent(self) -> Spent:
        """What was spent so far."""
        return replace(self._spent)

    @property
    def units(self) -> Units:
        return self._question.units

    @property
    def readout(self) -> str:
        return self._question.readout

    @property
    def capabilities(self) -> frozenset[str]:
        return self._question.capabilities

    def ask(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See :meth:`Question.ask`."""
        import numpy as np

        rows = np.asarray(keep, bool)
        if rows.ndim != 2 or rows.shape[1] != len(self.units):
            raise MethodError("ask again", f"keep of shape {rows.shape}", f"[coalition, {len(self.units)} units]")
        self._spend(forwards=len(rows))
        return self._question.ask(rows)

    @property
    def inputs(self) -> Tensor:
        return self._white("inputs").inputs.clone()  # type: ignore[no-any-return]

    @property
    def unit_of(self) -> Tensor:
        return self._white("unit_of").unit_of.clone()  # type: ignore[no-any-return]

    def background(self, n: int) -> Tensor:
        """See :meth:`White.background`."""
        return self._white("background").background(n)  # type: ignore[no-any-return]

    def forward(self, inputs: Tensor) -> Tensor:
        """See :meth:`White.forward`."""
        white = self._white("forward")
        self._spend(forwards=len(inputs))
        value: Tensor = white.forward(inputs)
        if value.requires_grad:
            rows = len(value)
            value.register_hook(lambda grad: self._spend(backwards=rows))  # type: ignore[no-untyped-call]
        return value

    def attention(self) -> NDArray[np.float64]:
        """mass[unit] of attention, averaged over layers, heads and queries (capability "attention")."""
        white = self._white("attention")
        self._spend(forwards=1)
        return white.attention()  # type: ignore[no-any-return]

    @property
    def removal(self) -> str:
        return self._white("removal").removal  # type: ignore[no-any-return]

    @property
    def levels(self) -> tuple[str, ...]:
        return self._white("levels").levels  # type: ignore[no-any-return]

    def ask_tokens(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """See :meth:`TextQuestion.ask_tokens`."""
        self._spend(forwards=len(keep))
        return self._white("ask_tokens").ask_tokens(keep)  # type: ignore[no-any-return]

    def suppress(self, factor: NDArray[np.float64], how: str = "multiply") -> NDArray[np.float64]:
        """See :meth:`TextQuestion.suppress`."""
        self._spend(forwards=len(factor))
        return self._white("suppress").suppress(factor, how)  # type: ignore[no-any-return]

    def embeddings(self) -> NDArray[np.float64]:
        """See :meth:`TextQuestion.embeddings`."""
        return self._white("embeddings").embeddings()  # type: ignore[no-any-return]

    def logit_parts(self, *choices: Any) -> Any:
        """See `engine/decompose.py` (capability "logit parts")."""
        self._spend(forwards=1)
        return self._white("logit_parts").logit_parts(*choices)

    def implicit_attention(self) -> Any:
        """See `models/recurrence.py` (capability "implicit attention")."""
        self._spend(forwards=1)
        return self._white("implicit_attention").implicit_attention()

    @property
    def objective(self) -> Any:
        """The trained model and its loss (capability "training examples"). Gradients of training examples ask the model
        nothing about the output, so they count in seconds alone."""
        return self._white("objective").objective

    @property
    def examples(self) -> Any:
        """What it was trained on."""
        return self._white("examples").examples

    @property
    def query(self) -> Any:
        """The output, as an example of the objective."""
        return self._white("query").query

    def refine(self, units: Iterable[int]) -> Metered:
        """See :meth:`TextQuestion.refine`; what is spent on it counts here."""
        return self._same_purse(self._white("refine").refine(units))

    def over(self, start: int, stop: int) -> Metered:
        """See :meth:`TextQuestion.over`; what is spent on it counts here."""
        return self._same_purse(self._white("over").over(start, stop))

    def _same_purse(self, question: Question) -> Metered:
        other = Metered(question, self._budget)
        other._spent, other._began = self._spent, self._began
        return other

    def _white(self, what: str) -> Any:
        if not hasattr(self._question, what):
            raise MethodError(f"{what} of this question", f"it offers {sorted(self.capabilities)}", "`ask`")
        return self._question

    def _spend(self, forwards: int = 0, backwards: int = 0) -> None:
        self._spent.forwards += forwards
        self._spent.backwards += backwards
        self.settle()

    def settle(self) -> None:
        """Take the time. Raises BudgetError where more was spent than given, also if an earlier one was swallowed."""
        self._spent.seconds = time.perf_counter() - self._began
        for name in ("forwards", "backwards", "seconds"):
            had, used = getattr(self._budget, name), getattr(self._spent, name)
            if used > had:
                raise BudgetError("ask the model again", f"{used:g} {name} of {had:g} spent", "a smaller sample")
