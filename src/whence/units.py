"""Units: named things that can be switched. Words of a prompt, here; layers, heads or training examples elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import PromptError


@dataclass(frozen=True)
class Units:
    """``names[i]`` is what a person calls unit ``i``; ``members[i]`` are its places in the model's own numbering.

    For words the members are token positions of each text encoder, ``members[word][encoder]``; a word that stands
    twice in the prompt is two units, told apart by ``occurrence`` (1, 2, ...).

    >>> words = Units("word", ("a", "red", "red"), (((1,),), ((2,),), ((3,),)), (1, 1, 2))
    >>> words.find("red"), words.find("red#2"), list(words.labels)
    (1, 2, ['a', 'red', 'red#2'])
    """

    kind: str
    names: tuple[str, ...]
    members: tuple[tuple[tuple[int, ...], ...], ...]
    occurrence: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.names):
            raise PromptError(
                f"{self.kind}s {', '.join(self.labels)}", "two have one label", "occurrence=(1, 2, ...), one for each"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names made unique: the second ``red`` is ``red#2``."""
        occurrence = self.occurrence or (1,) * len(self.names)
        return tuple(n if o == 1 else f"{n}#{o}" for n, o in zip(self.names, occurrence, strict=True))

    def _repr_html_(self) -> str:
        from .report.fragments import units_html

        return units_html(self)

    def find(self, label: str) -> int:
        """Index of a unit by its label. Raises PromptError naming the labels there are."""
        try:
            return self.labels.index(label)
        except ValueError:
            raise PromptError(
                f"the {self.kind} {label!r}", f"it is not among the {self.kind}s of this run", ", ".join(self.labels)
            ) from None

    def subset(self, indices: Sequence[int]) -> Units:
        """These units only."""
        occurrence = self.occurrence or (1,) * len(self.names)
        return Units(
            self.kind,
            tuple(self.names[i] for i in indices),
            tuple(self.members[i] for i in indices),
            tuple(occurrence[i] for i in indices),
        )
