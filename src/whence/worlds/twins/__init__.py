"""Two arms of units that look alike, in a table of features; a trained network uses one of them."""

from .tabular import WORLD, Twins

__all__ = ["WORLD", "Twins"]
