"""Carriers: training examples that taught a model one outcome, beside twins that could have and did not.

`marks` (the world ``carriers``) has pictures for a small classifier, `swaps` (the world ``documents``) short documents
for a small language model, `drawn` captioned pictures for a small diffusion model. Truth is what retraining does.
"""

from .marks import WORLD

__all__ = ["WORLD"]
