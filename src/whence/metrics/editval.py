"""Did my edit do what was asked, and leave the rest alone?

EditVal (Basu et al. 2023) names 13 types of edits and judges each picture twice, apart: *success* (is what was asked
for there) and *preservation* (is the rest as it was). Its automatic judge looks for objects with a detector and holds
presence and boxes against a rule for each of six types:

    object_addition      the new object is found in the second picture
    object_replacement   the new one is found and the old one is not
    alter_parts          the part is found
    positional_addition  the new one is found, and its centre lies where it shall from the centre of the old one
    position_replacement the object's centre has crossed to the named side of the picture or of the other object
    size                 the object's box has grown, or shrunk, by the factor

On `shapes` an oracle judges exactly, eight types; five do not exist there. A table is made for each editing method
over the same first pictures; pictures that were wrong before the edit have nothing to edit and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import RunError
from ..method import Card
from ..score import Score
from ..worlds.shapes.edits import Edit, Judged
from ..worlds.shapes.edits import judged as exact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

CARD = Card(
    name="editval",
    verb="editval",
    paper="Basu, Saberi, Bhardwaj, Chegini, Massiceti, Sanjabi, Hu and Feizi, EditVal: Benchmarking Diffusion Based "
    "Text-Guided Image Editing Methods, 2023",
    systems=("S003-03",),
    question="Did my edit do what was asked, and leave the rest alone?",
    units=("edit",),
    works_on=("pairs of pictures, before and after",),
    needs=("a judge: the oracle of `shapes`, or a detector",),
    cost="no model run for the oracle; two runs of the detector for each pair",
    claim="The automatic judge tells edits that were made from such that were not, and careful edits from careless "
    "ones, which the distance of the pictures cannot.",
    falsifier={
        "trial": "shapes.judging.measure",
        "planted": "scenes drawn twice by the generator: with the edit alone; without it; with the edit and one trait "
        "of the rest changed",
        "expect": 0.95,
        "control": "the same two judgements from the distance of the pixels, and from dice",
        "seconds": 8,
    },
    departs="The paper's pictures are photographs, its eight methods others; its human study is not repeated. "
    "Preservation is the share of traits that stayed, not DINO similarity or FID; for pictures of anything it is a "
    "similarity that is handed in. The factor of a change in size (1.2) is ours.",
    avoid="To compare methods on edits that one of them cannot express: read the table by type.",
)

TYPES: Mapping[str, str] = MappingProxyType(
    {
        "object_addition": "",
        "object_replacement": "",
        "positional_addition": "",
        "position_replacement": "",
        "size": "",
        "color": "",
        "shape": "",
        "background": "",
        "alter_parts": "the things of `shapes` have no parts",
        "texture": "the things of `shapes` have one texture",
        "style": "`shapes` is drawn in one style",
        "viewpoint": "`shapes` is flat",
        "action": "nothing moves in `shapes`",
    }
)
"""The 13 types; why `shapes` has no edit of a type, else ""."""
GROWN = 1.2
"""An object's side must grow (or shrink) by this factor to count as another size."""

Judge = Callable[[Edit, "Picture", "Picture"], Judged]


@dataclass(frozen=True)
class EditScores:
    """Of one type: ``success`` and ``preserved`` over pairs (None: not judged), ``moved`` in 0..255, and how many first
    pictures had nothing to edit."""

    kind: str
    success: Score
    preserved: Score | None
    moved: float | None
    skipped: int

    def record(self) -> dict[str, Any]:
        """The JSON record."""
        return {
            "type": self.kind,
            "success": self.success.record(),
            "preserved": self.preserved.record() if self.preserved else None,
            "moved": self.moved,
            "nothing_to_edit": self.skipped,
        }


class Detector(Protocol):
    """Finds named things in a picture."""

    def detect(self, image: Picture, names: Sequence[str]) -> list[tuple[str, float, Box]]:
        """(name, score, (left, top, right, bottom) in pixels), best first."""


def editval(
    edits: Sequence[Edit], before: Sequence[Picture], after: Sequence[Picture], judge: Judge = exact,
    there: Sequence[bool] | None = None,
) -> dict[str, EditScores]:  # fmt: skip
    """Type -> scores. ``edits``, ``before`` and ``after`` (uint8 [y, x, rgb]) belong together one by one; ``there``
    says which first pictures show what their prompt asks for. Raises RunError for an unknown type, for lists of
    different lengths, and where nothing is left of a type."""
    unknown = sorted({e.kind for e in edits} - set(TYPES))
    if unknown or not len(edits) == len(before) == len(after) == len(there if there is not None else edits):
        found = f"the types {', '.join(unknown)}" if unknown else f"{len(edits)} edits, {len(before)} and {len(after)}"
        raise RunError("EditVal", found, f"one edit, first and second picture each, of {', '.join(TYPES)}")
    kept = [True] * len(edits) if there is None else list(there)
    scores = {}
    for kind in [k for k in TYPES if any(e.kind == k for e in edits)]:
        rows = [i for i, e in enumerate(edits) if e.kind == kind]
        judged = [judge(edits[i], before[i], after[i]) for i in rows if kept[i]]
        if not judged:
            raise RunError(f"edits of type {kind}", "no first picture shows what its prompt asks for", "other seeds")
        stayed = [j.preserved for j in judged if j.preserved is not None]
        moved = [j.moved for j in judged if j.moved is not None]
        scores[kind] = EditScores(
            kind, Score.of(f"{kind}: success", "share of pictures", [float(j.success) for j in judged]),
            Score.of(f"{kind}: preserved", "share of the other traits", stayed) if stayed else None,
            sum(moved) / len(moved) if moved else None, len(rows) - len(judged),
        )  # fmt: skip
    return scores


def by_detector(
    detector: Detector, similarity: Callable[[Picture, Picture], float] | None = None, threshold: float = 0.1
) -> Judge:
    """EditVal's automatic judge. ``similarity``: of two pictures, 0..1, as preservation (the paper's is of DINO
    features). Raises RunError for a type that it has no rule for."""

    def boxes(image: Picture, name: str) -> list[Box]:
        return [box for found, score, box in detector.detect(image, [name]) if found == name and score >= threshold]

    def judge(edit: Edit, before: Picture, after: Picture) -> Judged:
        new, old = boxes(after, edit.new or edit.old), boxes(after, edit.old) if edit.old else []
        if edit.kind in ("object_addition", "alter_parts"):
            success = bool(new)
        elif edit.kind == "object_replacement":
            success = bool(new) and not old
        elif edit.kind == "positional_addition":
            success = bool(new and old) and _stands(edit.relation, new[0], old[0])
        elif edit.kind == "position_replacement":
            middle = (0.0, 0.0, float(after.shape[1]), float(after.shape[0]))
            success = bool(old) and _stands(edit.relation, old[0], new[0] if edit.new and new else middle)
        elif edit.kind == "size":
            was = boxes(before, edit.old)
            grown = _side(old[0]) / max(_side(was[0]), 1e-9) if was and old else 1.0
            success = grown >= GROWN if edit.new == "large" else grown <= 1 / GROWN and bool(was and old)
        else:
            raise RunError(f"the type {edit.kind} by a detector", "no rule is published for it", ", ".join(RULES))
        return Judged(bool(success), None if similarity is None else similarity(before, after))

    return judge


RULES = (
    "object_addition", "object_replacement", "alter_parts", "positional_addition", "position_replacement", "size",
)  # fmt: skip
"""Types that a detector can judge."""


def _side(box: Box) -> float:
    return float(((box[2] - box[0]) * (box[3] - box[1])) ** 0.5)


def _stands(relation: str, a: Box, b: Box) -> bool:
    """Whether the centre of a lies left of, right of, above or below that of b. Raises RunError for another word."""
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    holds = {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}
    if relation not in holds:
        raise RunError(f"the relation {relation!r}", "no rule for it", ", ".join(holds))
    return holds[relation]
