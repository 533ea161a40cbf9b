"""One family of errors. Each says what was asked, what was found and what would work.

Raised once, at the public boundary, before work starts. The command line prints the text and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WhenceError(Exception):
    """Base of the family.

    >>> print(WhenceError("explain by 'damm'", "no such method", "daam"))
    asked: explain by 'damm'
    found: no such method
    would work: daam
    """

    def __init__(self, asked: str, found: str, would_work: str) -> None:
        self.asked, self.found, self.would_work = asked, found, would_work
        super().__init__(f"asked: {asked}\nfound: {found}\nwould work: {would_work}")

    def __reduce__(self) -> tuple[type[WhenceError], tuple[str, str, str]]:
        # An error of a worker process has to arrive whole; by default an exception is made again from its text alone.
        return type(self), (self.asked, self.found, self.would_work)


class ModelError(WhenceError):
    """The model cannot be loaded, or its files cannot be trusted (a pickle)."""


class PromptError(WhenceError):
    """The prompt is empty, too long, or has words that the model never saw; or a word is not in the prompt."""


class MethodError(WhenceError):
    """No such method, or a method that this model cannot serve."""


class WrongMapError(WhenceError):
    """The map would be wrong: cached blocks, an unknown attention kernel, nothing recorded."""


class OutputError(WhenceError):
    """The output cannot be written."""


class RunError(WhenceError):
    """The run's settings do not fit the model, or the run cannot be replayed."""


class BudgetError(WhenceError):
    """An explainer spent more model runs or time than it was given."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The names that ``name`` may have meant, for the "would work" line.

    >>> nearest("damm", ["daam", "leave_one_out"])
    "'daam' (of daam, leave_one_out)"
    """
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1)
    listing = ", ".join(known)
    return f"{close[0]!r} (of {listing})" if close else listing
