"""Which training examples most caused this output, at a storage I can afford? Low-rank influence functions.

For each layer, as in LoGRA, G_i = P_out' (sum_t d_t x_t') P_in. Then (LoRIF, 2026, in its symbols)

1. factors: G_i ~ U_i V_i' of rank c, by block power iteration; c (d_out + d_in) numbers are kept instead of
   d_out d_in;
2. curvature: the N x D matrix of rows vec(U_i V_i') is taken to its leading r right singular vectors V_r and values s,
   shard by shard (randomised, oversampling 10, 3 power iterations);
3. score(q, i) = (1/lambda) [g_q' g_i - g_q' V_r diag(s^2 / (lambda + s^2)) V_r' g_i], by Woodbury, summed over layers.

Here the inverse is applied to the query, once: M_q = (1/lambda) [g_q - V_r diag(...) V_r' g_q], d_out x d_in, and the
score is sum_c u_c' M_q v_c. The numbers are the same; the cost of an example no longer depends on r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.codes import Factors
from ..engine.curvature import truncated
from ..engine.schemes import Rows
from ..errors import RunError
from ..method import Card

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.influence import Fitted, Shelf
    from ..objective import Examples, Objective

CARD = Card(
    name="lorif",
    verb="LoRIF",
    paper="LoRIF: Low-Rank Influence Functions for Scalable Training Data Attribution, arXiv 2601.21929 (2026)",
    systems=("S001-03",),
    question="Which training examples most caused this output, at a storage I can afford?",
    units=("training example",),
    works_on=("language models", "diffusion models", "classifiers", "graph nets"),
    needs=("training examples",),
    cost="one forward and backward per training example, once; 2 rank (d_out + d_in) bytes per example and layer; one "
    "forward and backward per query and a scan",
    claim="Examples that taught the model an outcome score above louder ones, whose gradients are larger.",
    falsifier={
        "trial": "carriers.loud",
        "planted": "the carriers of the mark that decides; the other mark's examples have larger gradients",
        "expect": 0.9,
        "control": "random and shuffled scores, similarity of inputs, the label, the norm: about .5; grad_dot .32",
        "seconds": 5,
    },
    departs="The inverse is applied to the query, not to each example (equal numbers). Biases, embeddings and norms "
    "are projected too. A rank above 1 is orthonormalised by "
    "QR. lambda is the paper's .1 x the mean of the leading s^2 unless damping= says otherwise.",
    avoid="Where the gradients of single examples are not near rank 1 (measure: energy()); a bit per whitened "
    "coordinate keeps more for the same bytes there (eogp).",
)


@dataclass(frozen=True)
class LoRIF:
    """``rank``: c; ``size``: numbers per side of the projection; ``singular``: r; ``damping``: "paper" (.1 x the mean
    of the leading r + 10 squared singular values), "trace" (.5 trace / D), or lambda as a share of trace / D."""

    rank: int = 1
    size: int = 32
    singular: int = 256
    damping: float | str = "paper"
    layers: tuple[str, ...] | None = None
    seed: int = 0

    def fit(self, objective: Objective, examples: Examples, shelf: Shelf | None = None) -> Fitted:
        """One pass over the examples, five over what was kept. Raises RunError, MethodError."""
        from ..engine.influence import fit

        if self.rank < 1:
            raise RunError(f"factors of rank {self.rank}", "nothing would be kept", "1 or more")
        if isinstance(self.damping, str) and self.damping not in ("paper", "trace"):
            raise RunError(f"the damping {self.damping!r}", "no such rule", "paper, trace, or a number")
        return fit(
            self, CARD.name, self.scheme, objective, examples, shelf, self.size, "random", self.layers, self.seed
        )

    def scheme(self, shapes: Mapping[str, tuple[int, int]]) -> _Scheme:
        """What is kept and scored of gradients of these shapes."""
        return _Scheme(shapes, self)


class _Scheme(Rows):
    plane = "factors"

    def __init__(self, shapes: Mapping[str, tuple[int, int]], settings: LoRIF) -> None:
        super().__init__(Factors(dict(shapes), settings.rank))
        self.shapes, self.settings = dict(shapes), settings

    def finish(self, shelf: Shelf) -> None:
        """V_r and s of each layer's reconstructed rows."""
        for name, (out, inp) in self.shapes.items():

            def rows(name: str = name) -> Iterator[Tensor]:
                for _, codes in shelf.blocks("factors", rows=4096):
                    u, v = self.codec.factors(codes)[name]
                    yield (u.float() @ v.float().mT).flatten(1)

            r = min(self.settings.singular, out * inp)
            basis, s = truncated(rows, out * inp, min(r + 10, out * inp), (self.settings.seed, name))
            total = sum(float(x.pow(2).sum()) for x in rows())
            given = self.settings.damping
            if given == "paper":
                damping = 0.1 * float((s**2).mean())
            else:
                damping = (0.5 if isinstance(given, str) else given) * total / (out * inp)
            self.keep(name, basis=basis[:, :r], s=s[:r], damping=damping)

    def prepare(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """M_q of each layer, [query, out, in]."""
        found, dampings = {}, self.damping
        for name, g in gradients.items():
            basis, s = self.learned[f"basis/{name}"], self.learned[f"s/{name}"]
            damping = max(dampings[name], 1e-30)
            row = g.detach().flatten(1).float().cpu()
            inside = row @ basis
            # Written as the part outside the space and the part inside: s^2/(lambda + s^2) rounds to 1.
            outside = row - inside @ basis.T
            whole = outside / damping + inside / (damping + s**2) @ basis.T
            found[name] = whole.view(-1, *self.shapes[name])
        return found


def energy(g: Tensor, ranks: tuple[int, ...] = (1, 2, 4, 8)) -> dict[int, float]:
    """Share of the squared norm of gradients [example, out, in] that factors of each rank keep, mean over examples."""
    import torch

    s2 = torch.linalg.svdvals(g.double()) ** 2
    return {c: float((s2[:, :c].sum(1) / s2.sum(1).clamp_min(1e-300)).mean()) for c in ranks if c <= s2.shape[1]}
