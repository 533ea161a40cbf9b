"""Two arms of words that are used alike, in sequences; a trained transformer reads one of them."""

from .sentences import WORLD

__all__ = ["WORLD"]
