"""A tiny Stable Diffusion pipeline wired by hand: one cross-attention alone carries the prompt into the picture.

Its twin is a cross-attention of the same size with larger outputs, which are the same whatever the prompt says.
"""

from __future__ import annotations

from typing import Any

import torch

from whence.models import tiny
from whence.models.loading import load

REAL = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
TWIN = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"


def wired(real: str = REAL, twin: str = TWIN) -> Any:
    """The adapter. All other cross-attentions add nothing."""
    pipeline = tiny.tiny("sd", seed=3)
    with torch.no_grad():
        for name, module in pipeline.unet.named_modules():
            if not name.endswith(".attn2"):
                continue
            out = module.to_out[0]
            if name == real:
                out.weight.mul_(8)
                module.to_k.weight.mul_(4)
            elif name == twin:
                out.weight.zero_()
                out.bias.normal_(generator=torch.Generator().manual_seed(1)).mul_(3)
            else:
                out.weight.zero_()
                out.bias.zero_()
    return load(pipeline)
