"""Arms: which units of a world decide what, and how their states are drawn, swapped and put together.

Each structure has two arms of units with the same joint distribution; a keyed coin says on which one its output
depends. A unit is on or off, both equally often. In mediation and confounder the second unit copies the first, but for
one time in four (NOISE). Nothing here knows how a state looks to a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ..ground import STRUCTURES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bools = NDArray[np.bool_]

NOISE = 0.25
"""How often a copying unit is not like the unit that it copies."""
_NOISY = 0.6744897501960817
"""A standard normal exceeds this with probability NOISE."""
SURE = 0.98
"""The probability that models are taught to give to what is so: were it 1, float32 would round gradients to 0."""
COPIES = frozenset({"mediation", "confounder"})
"""Structures whose second unit copies the first."""
_DECIDES: Mapping[str, Callable[[Bools], Bools]] = MappingProxyType(
    {
        "single": lambda a: a[..., 0],
        "and": lambda a: a[..., 0] & a[..., 1],
        "or": lambda a: a[..., 0] | a[..., 1],
        "xor": lambda a: a[..., 0] ^ a[..., 1],
        "suppression": lambda a: a[..., 0] & ~a[..., 1],
        "absence": lambda a: ~a[..., 0],
        "mediation": lambda a: a[..., 1],
        "confounder": lambda a: a[..., 0],
    }
)
_OBSERVED = MappingProxyType(
    {
        "single": ((False,), (True,)),
        "and": ((True, True),),
        "or": ((True, True),),
        "xor": ((True, False), (False, True)),
        "suppression": ((True, True),),
        "absence": ((False,),),
        "mediation": ((False, False), (True, True)),
        "confounder": ((False, False), (True, True)),
    }
)
"""The states of an arm about which a question of each structure may be asked."""


@dataclass(frozen=True)
class Arms:
    """What each unit is. ``arm[structure]`` decides the structure's output, ``twin[structure]`` nothing;
    ``parent[unit]`` is the unit that it copies, -1 for none. Units in no arm are distractors. ``names[unit]`` say
    nothing."""

    names: tuple[str, ...]
    arm: Mapping[str, tuple[int, ...]]
    twin: Mapping[str, tuple[int, ...]]
    parent: NDArray[np.int64]

    def outcomes(self, states: Bools) -> Bools:
        """What each structure's output should say: states[..., unit] -> bool [..., structure]."""
        return np.stack([_DECIDES[s](states[..., list(arm)]) for s, arm in self.arm.items()], -1)

    def lessons(self, states: Bools) -> NDArray[np.float32]:
        """What a model is to say of states[row, unit], [row, structure]: SURE where it is so, else 1 - SURE."""
        return np.where(self.outcomes(states), SURE, 1 - SURE).astype(np.float32)

    def render(self, drawn: NDArray[np.floating], keep: Bools | None = None, seen: Bools | None = None) -> Bools:
        """states[row, unit] from standard normals drawn[row, unit, 2]: one for the state, one for the noise of a copy.

        Units of keep[row, unit] stay as in seen[unit]. The others are set as after an intervention: a first unit is
        drawn whatever its copy is kept at, a copy follows what its first unit has become.
        """
        states: Bools = drawn[..., 0] > 0
        if keep is not None and seen is not None:
            states = np.where(keep, seen, states)
        copies = np.flatnonzero(self.parent >= 0)
        followed = states[:, self.parent[copies]] ^ (drawn[:, copies, 1] > _NOISY)
        states[:, copies] = followed if keep is None else np.where(keep[:, copies], states[:, copies], followed)
        return states

    def training(self, drawn: NDArray[np.floating]) -> Bools:
        """states[row, unit] to learn from: as :meth:`render`, but in the first half of the rows copies are free.

        Half of them come from experiments, so to speak: a model that only ever saw a copy beside its first unit would
        have little reason to read the one and not the other.
        """
        states = self.render(drawn)
        half, copies = len(states) // 2, np.flatnonzero(self.parent >= 0)
        states[:half, copies] = drawn[:half, copies, 1] > 0
        return states

    def opposite(self, seen: Bools, which: Bools) -> Bools:
        """states[row, unit] with the units of which[row, unit] in their opposite state; a copy that is not among them
        follows its first unit, with its noise as it was."""
        copies = np.flatnonzero(self.parent >= 0)
        flipped = which.copy()
        flipped[:, copies] |= which[:, self.parent[copies]]
        states: Bools = seen ^ flipped
        return states

    def asked(self, structure: str, rng: np.random.Generator) -> Bools:
        """seen[unit]: an input about which this structure's question may be asked, arm and twin in the same states."""
        states: Bools = self.render(rng.standard_normal((1, len(self.names), 2)))[0]
        choices = _OBSERVED[structure]
        chosen = choices[rng.integers(len(choices))]
        for side in (self.arm, self.twin):
            states[list(side[structure])] = chosen
        return states


def lay_out(structures: tuple[str, ...], distractors: int, rng: np.random.Generator) -> Arms:
    """Arms, twins and ``distractors`` units at permuted places under permuted names; one coin for each structure."""
    sizes = [STRUCTURES[s].size for s in structures]
    units = 2 * sum(sizes) + distractors
    places = iter(rng.permutation(units).tolist())
    parent = np.full(units, -1)
    arm, twin = {}, {}
    # Output 2 must not be `or` in every draw: an explainer could say the shape of its answer without asking.
    for structure, size in [(structures[i], sizes[i]) for i in rng.permutation(len(structures))]:
        pair = [tuple(next(places) for _ in range(size)) for _ in range(2)]
        if structure in COPIES:
            for first, second in pair:
                parent[second] = first
        coin = int(rng.integers(2))
        arm[structure], twin[structure] = pair[coin], pair[1 - coin]
    names = tuple(f"u{i:02d}" for i in rng.permutation(units))
    return Arms(names, MappingProxyType(arm), MappingProxyType(twin), parent)
