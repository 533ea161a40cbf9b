"""The pictures that the `emoji` model was trained on: (caption, picture)."""

from .pictures import training_set

__all__ = ["training_set"]
