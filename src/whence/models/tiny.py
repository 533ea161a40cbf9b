"""Tiny untrained pipelines of every family, of real diffusers and transformers parts, built without a download.

Their pictures mean nothing; their code paths are those of the real models. Tests and benchmarks run on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .small_stable_diffusion import word_tokenizer

WORDS = (
    "a", "and", "big", "bird", "blue", "cat", "circle", "dog", "field", "flying", "forest", "fox", "green", "left",
    "of", "over", "red", "small", "snow", "square", "the", "white", "with", "yellow",
)  # fmt: skip
CLIP_TOKENS = 77
T5_TOKENS = 48


def piece_tokenizer(words: Sequence[str] = WORDS, length: int = T5_TOKENS) -> Any:
    """A T5 tokenizer for which each of ``words`` is one piece; other words fall apart into letters."""
    from transformers import T5Tokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,.-()"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    vocab += [(f"▁{word}", -1.0) for word in words] + [(letter, -4.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, additional_special_tokens=None, model_max_length=length)


def _clip(tokenizer: Any, hidden: int, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=projection or hidden,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config)


def _t5(tokenizer: Any, hidden: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=hidden, d_kv=hidden // 2, d_ff=2 * hidden, num_layers=1, num_heads=2
        )
    )


def _vae(channels: int, scaling: dict[str, float] | None = None, factor: int = 4) -> Any:
    """``factor`` (4 or 8) pixels to a latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 16) if factor == 4 else (8, 8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * (3 if factor == 4 else 4),
        up_block_types=("UpDecoderBlock2D",) * (3 if factor == 4 else 4),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
        **(scaling or {}),
    )


def _clip_tokenizer() -> Any:
    return word_tokenizer(WORDS, CLIP_TOKENS)


def stable_diffusion(size: int = 16, width: int = 32, factor: int = 4) -> Any:
    """SD1-like: cross-attention at two resolutions and in the middle block; two layers in a block."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = _clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,  # read as the number of heads
    )
    return StableDiffusionPipeline(
        vae=_vae(4, factor=factor),
        text_encoder=_clip(tokenizer, 32),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(size: int = 16, width: int = 32) -> Any:
    """SDXL-like: two text encoders of different widths, no attention at the first resolution."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = _clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip(tokenizer, 32),
        text_encoder_2=_clip(tokenizer, 32, projection=32),
        tokenizer=tokenizer,
        tokenizer_2=_clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def pixart(size: int = 16, heads: int = 4, channels: int = 8, layers: int = 2) -> Any:
    """PixArt-like: T5 with a padding mask, cross-attention."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    tokenizer = piece_tokenizer()
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer, 32),
        vae=_vae(4),
        transformer=PixArtTransformer2DModel(
            sample_size=size,
            num_layers=layers,
            patch_size=2,
            attention_head_dim=channels,
            num_attention_heads=heads,
            caption_channels=32,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=heads * channels,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )


def stable_diffusion_3(size: int = 16, heads: int = 4, channels: int = 8, layers: int = 2) -> Any:
    """SD3-like: two CLIPs and a T5 on one text axis, joint attention."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, pieces = _clip_tokenizer(), piece_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=size,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=channels,
            num_attention_heads=heads,
            joint_attention_dim=64,
            caption_projection_dim=heads * channels,
            pooled_projection_dim=64,
            pos_embed_max_size=max(size, 16),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, {"shift_factor": 0.06}),
        text_encoder=_clip(tokenizer, 32, projection=32),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, 32, projection=32),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(pieces, 64),
        tokenizer_3=pieces,
    )


def flux(
    guidance: bool = True, size: int = 16, heads: int = 2, channels: int = 16, layers: int = 1, singles: int = 2
) -> Any:
    """FLUX-like: double and single blocks, rotary places, guidance as an input (dev) or none (schnell)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, pieces = _clip_tokenizer(), piece_tokenizer()
    half = channels // 2
    pipeline = FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=layers,
            num_single_layers=singles,
            attention_head_dim=channels,
            num_attention_heads=heads,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance,
            axes_dims_rope=(channels - 2 * (half - half // 2 // 2 * 2), *[half - half // 2 // 2 * 2] * 2),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4, {"shift_factor": 0.1}),
        text_encoder=_clip(tokenizer, 32),
        tokenizer=tokenizer,
        text_encoder_2=_t5(pieces, 32),
        tokenizer_2=pieces,
    )
    pipeline.default_sample_size = size
    return pipeline


def flux_schnell(**settings: Any) -> Any:
    """FLUX whose guidance is distilled away."""
    return flux(guidance=False, **settings)


BUILDERS: dict[str, Callable[..., Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "pixart": pixart,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "flux-schnell": flux_schnell,
}


def tiny(family: str, seed: int = 0, **sizes: Any) -> Any:
    """An untrained pipeline of a family of :data:`BUILDERS`, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILDERS[family](**sizes)
