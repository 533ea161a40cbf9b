"""Builds a small, untrained Stable Diffusion pipeline of real diffusers and transformers parts.

Worlds train it; nothing in here is specific to a world but the words that its tokenizer must know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

TOKENS = 24
"""Longest prompt in tokens, with the start and end token."""
IMAGE_SIZE, LATENT_SIZE = 64, 16


def byte_pairs(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Byte-pair encoding that ends with each word as one piece: (pieces, merges), the same on every machine.

    The `tokenizers` trainer breaks ties by hash order, so two trainings of one world would number their words
    differently; here ties go to the alphabetically first pair.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(c + "</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    split = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    while pairs := Counter(pair for word in split for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        if "".join(best) not in pieces:
            pieces.append("".join(best))
        for word in split:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return pieces, merges


def word_tokenizer(words: Sequence[str], length: int = TOKENS) -> Any:
    """A CLIP tokenizer for which each of ``words`` is one token; other words fall apart into letters."""
    from transformers import CLIPTokenizer

    pieces, merges = byte_pairs(words)
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        model_max_length=length,
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    split = [w for w in words if len(tokenizer(w).input_ids) != 3]
    if split:
        raise ValueError(f"the tokenizer splits {split}")
    return tokenizer


def build_pipeline(words: Sequence[str], seed: int = 0) -> Any:
    """An untrained ``StableDiffusionPipeline`` for 64 x 64 pictures with 16 x 16 latents, about 5 M parameters."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = word_tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(16, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=IMAGE_SIZE,
            mid_block_add_attention=False,
        )
        unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            block_out_channels=(32, 96, 128),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            # Most transformer layers where all places see each other cheapest: how many objects, and which where.
            transformer_layers_per_block=(1, 1, 3),
            norm_num_groups=16,
            cross_attention_dim=128,
            attention_head_dim=(2, 4, 4),  # diffusers reads this as the number of heads for this model class
        )
    # Fresh noise at every step lets later steps mend what early ones got wrong: a deterministic sampler
    # draws an object too many far more often.
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
