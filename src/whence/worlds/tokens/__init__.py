"""Two arms of words that are used alike, in sequences; a trained transformer reads one of them."""

from .sentences import WORLD, Tokens

__all__ = ["WORLD", "Tokens"]
