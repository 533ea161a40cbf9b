"""A tiny OWL-ViT, untrained, in a folder of transformers' own format."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
)

from whence.models.small_stable_diffusion import word_tokenizer


def tiny_owl(place: Path) -> Path:
    """48 x 48 pixels in patches of 16: nine boxes."""
    tokenizer = word_tokenizer(["cat", "dog"], 16)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OwlViTConfig(
        text_config={**small, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 56, "eos_token_id": 57},
        vision_config={**small, "image_size": 48, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    OwlViTForObjectDetection(config).save_pretrained(place)
    images = OwlViTImageProcessor(size={"height": 48, "width": 48}, do_center_crop=False)
    OwlViTProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(place)
    return place
