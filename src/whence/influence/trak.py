"""Which training examples was this output regressed from? The trained model as a linear one in its gradients.

Of a model output function f (the log-odds of the right class for classifiers) and a random projection P of the whole
gradient, for each of M independently trained models (Park et al. 2023):

    phi(z) = P' grad f(z),     Phi = [phi(z_1); ...; phi(z_N)],     Q = diag(dL/df) = diag(1 - p_i)
    tau(q) = S( [1/M sum_m phi_m(q)' (Phi_m' Phi_m)^-1 Phi_m']  [1/M sum_m Q_m],  threshold )

what one Newton step of logistic regression on these features says of leaving example i out; the two means over models
are taken apart, and S is a soft threshold. Where k is not far below N, Phi' Phi is (nearly) singular and the scores are
noise: lambda is added. A classifier's objective is asked for its log-odds instead of its loss; any other output is its
own loss, for which Q = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engine.influence import flat
from ..engine.project import subsampled_hadamard
from ..engine.schemes import Kernel
from ..engine.together import Together, total
from ..errors import RunError
from ..method import Card

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..engine.influence import Fitted, Shelf
    from ..objective import Examples, Losses, Objective

CARD = Card(
    name="trak",
    verb="TRAK",
    paper="Park et al. 2023, TRAK: Attributing Model Behavior at Scale",
    systems=(),
    question="Which training examples was this output regressed from?",
    units=("training example",),
    works_on=("classifiers", "language models", "diffusion models", "graph nets"),
    needs=("training examples",),
    cost="one forward and backward per training example and model, once; one per query and model; 2 size bytes per "
    "example and model",
    claim="Examples that taught the model an outcome score above their twins, which carry the same label.",
    falsifier={
        "trial": "carriers.marks",
        "planted": "the carriers, whose mark goes with one label throughout",
        "expect": 0.9,
        "control": "random and shuffled scores, similarity of inputs, the label, the norm: about .5",
        "seconds": 5,
    },
    departs="The random projection of the whole gradient is a Hadamard transform with random signs of which k numbers "
    "are kept, not a dense matrix: inner products are kept as well, at a cost that does not grow with k. side= "
    "projects each layer on both sides before that. lambda is added to Phi' Phi, where the paper has none: twice its "
    "mean eigenvalue, chosen on small trials, carriers.marks among them (on 400 digits the LDS is .22 with none, .42 "
    "by held-out likelihood, which damping=None asks for, .68 with half of it or all, .65 with twice; on the marks "
    ".79, .90 and .98 of the carriers' pairs are found with half, all and twice). The soft threshold is off, and is a "
    "number where the paper cross-validates it. For language models, diffusion models and graph nets f is the loss, "
    "and Q = 1. Rows are float16.",
    avoid="With one model only, where several can be trained: the paper's numbers are of ensembles. Where few examples "
    "with labels that do not follow are loud: on carriers.loud it names them first, logra and lorif do not.",
)


@dataclass(frozen=True)
class TRAK:
    """``size``: k, numbers that the whole gradient is projected to; None: it stays whole. ``damping``: lambda as a
    share of the mean of the min(k, N) eigenvalues that there can be; None: by held-out likelihood. ``threshold``: of
    the scores, in their own unit. ``side``: numbers per side that each layer's gradient is brought to first, for
    models too large for whole ones."""

    size: int | None = 1024
    damping: float | None = 2.0
    threshold: float = 0.0
    side: int | None = None
    layers: tuple[str, ...] | None = None
    seed: int = 0

    def fit(self, objective: Objective | Sequence[Objective], examples: Examples, shelf: Shelf | None = None) -> Fitted:
        """One pass over the examples; ``objective``: one for each model. Raises RunError, MethodError."""
        from ..engine.influence import fit

        models = tuple(objective) if isinstance(objective, Sequence) else (objective,)
        if self.size is not None and self.size < 1:
            raise RunError(f"features of {self.size} numbers", "nothing would be kept", "1 or more, or None")
        layers = self.layers and tuple(f"models.{m}.{p}" for m in range(len(models)) for p in self.layers)
        layers = layers and (*layers, "weights.*")
        return fit(
            self, CARD.name, lambda shapes: _Scheme(shapes, self), _Outputs(models), examples, shelf,
            self.side, "random", layers, self.seed,
        )  # fmt: skip


class _Outputs(Together):
    """The output functions of all models as one objective. An example's 1 - p travels as the gradient of a weight that
    is made for nothing else."""

    def __init__(self, models: tuple[Objective, ...]) -> None:
        from torch import nn

        from ..models.objectives import ClassifierObjective, MarginObjective

        given = [MarginObjective(m.module, m.name) if type(m) is ClassifierObjective else m for m in models]
        super().__init__(given, f"TRAK of {len(given)} models")
        self.carriers: dict[int, nn.Module] = {}
        for i, model in enumerate(given):
            if isinstance(model, MarginObjective):
                like = next(model.module.parameters())
                # Made on no device first: nothing is drawn from the global generator.
                carrier = nn.Linear(1, 1, bias=False, device="meta", dtype=like.dtype).to_empty(device=like.device)
                nn.init.zeros_(carrier.weight)
                self.carriers[i] = carrier
        weights = nn.ModuleDict({str(i): carrier for i, carrier in self.carriers.items()})
        self.module = nn.ModuleDict({"models": self.module, "weights": weights})

    def losses(self, examples: Sequence[Any]) -> Losses:
        found = [model.losses(examples) for model in self.objectives]
        values = [f.values for f in found]
        for i, carrier in self.carriers.items():
            q = values[i].detach().sigmoid()  # the value is -f, and 1 - p = 1 / (1 + e^f)
            values[i] = values[i] + q * carrier(q.new_ones(len(q), 1))[:, 0]
        return total(found, values)


class _Scheme(Kernel):
    def __init__(self, shapes: Mapping[str, tuple[int, int]], settings: TRAK) -> None:
        self.settings = settings
        self.layers: dict[str, list[str]] = {}
        for name in sorted(shapes):  # the projection hangs on the order
            kind, m = name.split(".")[:2]
            if kind == "models":
                self.layers.setdefault(m, []).append(name)
        self.weighted = [m for m in self.layers if f"weights.{m}" in shapes]
        whole = {m: sum(shapes[n][0] * shapes[n][1] for n in names) for m, names in self.layers.items()}
        super().__init__({m: min(w, settings.size or w) for m, w in whole.items()}, settings.damping)

    @property
    def planes(self) -> dict[str, int]:
        return super().planes | ({"weights": 4 * len(self.weighted)} if self.weighted else {})

    def features(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """phi of each model, [example, k]."""
        s = self.settings
        return {
            m: subsampled_hadamard(flat({n: gradients[n] for n in names}), s.size, "trak", s.seed, m)
            for m, names in self.layers.items()
        }

    def encode(self, gradients: Mapping[str, Tensor]) -> dict[str, NDArray[np.uint8]]:
        import numpy as np

        found = super().encode(gradients)
        if self.weighted:
            weights = flat({m: gradients[f"weights.{m}"] for m in self.weighted})
            found["weights"] = np.ascontiguousarray(weights.numpy()).view(np.uint8)
        return found

    def score(self, prepared: dict[str, Tensor], codes: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.float32]:
        import numpy as np

        found = super().score(prepared, codes)
        if self.weighted:
            # A model without a weight of its own has Q = 1.
            weights = np.ascontiguousarray(codes["weights"]).view(np.float32).sum(1)
            found = found * ((weights + len(self.layers) - len(self.weighted)) / len(self.layers))
        threshold = self.settings.threshold
        return np.sign(found) * np.maximum(np.abs(found) - threshold, 0) if threshold else found
