"""Two arms of units that look alike, in a table of features; a trained network uses one of them."""

from .tabular import WORLD

__all__ = ["WORLD"]
