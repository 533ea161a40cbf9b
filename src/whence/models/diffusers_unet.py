"""Stable Diffusion 1 and 2, and SDXL: a UNet whose every block attends to the text in attentions of their own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.capture import Layer
from ..run import Settings
from .pictures import Pictures, Prompted
from .words import Encoder

_GUIDED = frozenset({"pictures", "cross-attention", "guidance", "negative-prompt"})


class StableDiffusion(Pictures):
    """Stable Diffusion 1 and 2: one CLIP encoder."""

    family: ClassVar[str] = "Stable Diffusion"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    capabilities = _GUIDED
    steps, guidance = 30, 7.5

    @property
    def denoiser(self) -> Any:
        return self.pipeline.unet

    def encoders(self) -> tuple[Encoder, ...]:
        tokenizer = self.pipeline.tokenizer
        return (Encoder("CLIP", tokenizer, tokenizer.model_max_length),)

    def layers(self, height: int, width: int) -> tuple[Layer, ...]:
        """All attentions to the text, in the order in which they run: down, middle and up blocks."""
        unet = self.denoiser
        scale = self.pipeline.vae_scale_factor
        sizes = [(height // scale, width // scale)]
        for block in unet.down_blocks:
            tall, wide = sizes[-1]
            # A stride-2 convolution with a border of 1 keeps the larger half of an odd size.
            sizes.append((-(-tall // 2), -(-wide // 2)) if block.downsamplers is not None else (tall, wide))
        deepest = len(unet.down_blocks) - 1
        found: dict[str, list[Layer]] = {"down_blocks": [], "mid_block": [], "up_blocks": []}
        for name, module in unet.named_modules():
            if not name.endswith(".attn2") or not module.is_cross_attention:
                continue
            place, number = name.split(".")[:2]
            if place == "mid_block":
                level = deepest + 1
            else:
                level = int(number) if place == "down_blocks" else deepest - int(number)
            found[place].append(Layer(name, module, "cross", module.heads, *sizes[level]))
        return tuple(layer for layers in found.values() for layer in layers)

    def guided(self, settings: Settings) -> bool:
        """Guidance-distilled UNets (LCM) take the scale as an input and have no unconditional rows."""
        return super().guided(settings) and self.denoiser.config.time_cond_proj_dim is None

    def encode(self, prompts: list[str], negative: str, guided: bool) -> Prompted:
        pipeline = self.pipeline
        embeds, negatives = pipeline.encode_prompt(
            prompts, pipeline._execution_device, 1, guided, [negative] * len(prompts) if negative else None
        )
        inputs = {"prompt_embeds": embeds} | ({"negative_prompt_embeds": negatives} if guided else {})
        return Prompted(embeds, inputs)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two CLIP encoders whose features stand side by side on one text axis."""

    family: ClassVar[str] = "SDXL"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    steps, guidance = 30, 5.0

    def encoders(self) -> tuple[Encoder, ...]:
        pair = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        return tuple(Encoder(f"CLIP {i}", t, t.model_max_length) for i, t in enumerate(pair, 1) if t is not None)

    def encode(self, prompts: list[str], negative: str, guided: bool) -> Prompted:
        pipeline = self.pipeline
        embeds, negatives, pooled, pooled_negatives = pipeline.encode_prompt(
            prompts,
            device=pipeline._execution_device,
            do_classifier_free_guidance=guided,
            negative_prompt=[negative] * len(prompts) if negative else None,
        )
        inputs = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if guided:
            inputs |= {"negative_prompt_embeds": negatives, "negative_pooled_prompt_embeds": pooled_negatives}
        return Prompted(embeds, inputs)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        config = vae.config
        latents = latents / config.scaling_factor
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                torch.tensor(v, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
                for v in (config.latents_mean, config.latents_std)
            )
            latents = latents * std + mean
        return vae.decode(latents, return_dict=False)[0]  # type: ignore[no-any-return]
