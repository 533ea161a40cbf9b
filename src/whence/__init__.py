"""Whence: where did this picture or text come from? Answers, and their trial by running the model again.

>>> import whence
>>> model = whence.load()                                                  # doctest: +SKIP
>>> run = model.picture("a red circle left of a blue square", seed=7)      # doctest: +SKIP
>>> whence.explain(run, by="daam")                                         # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Run": "run",
    "Settings": "run",
    "Units": "units",
    "Readout": "readout",
    "Explanation": "explanation",
    "Verdict": "verdict",
    "Card": "method",
    "catalogue": "method",
    "WhenceError": "errors",
    "explain": "verbs",
    "load": "verbs",
    "prove": "proving",
    "read": "models.reading",
}
__all__ = [
    "Card", "Explanation", "Readout", "Run", "Settings", "Units", "Verdict", "WhenceError", "__version__", "catalogue",
    "explain", "load", "prove", "read",
]  # fmt: skip

if TYPE_CHECKING:
    from .errors import WhenceError
    from .explanation import Explanation
    from .method import Card, catalogue
    from .models.reading import read
    from .proving import prove
    from .readout import Readout
    from .run import Run, Settings
    from .units import Units
    from .verbs import explain, load
    from .verdict import Verdict


def __getattr__(name: str) -> Any:
    # Heavy things load when first used: `import whence` takes milliseconds and no torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'whence' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
