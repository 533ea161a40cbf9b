"""PixArt, Stable Diffusion 3 and FLUX: transformers.

PixArt attends to the text in attentions of their own, under a padding mask. SD3 and FLUX mix both in one sequence:
SD3 puts the picture first, FLUX the text; FLUX's single blocks carry both in one stream.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..engine.capture import Layer
from ..errors import RunError
from ..run import Settings
from .pictures import Pictures, Prompted
from .words import Encoder


class _Transformer(Pictures):
    @property
    def denoiser(self) -> Any:
        return self.pipeline.transformer

    def text_length(self, tokenizer: Any, longest: int) -> int:
        """Tokens of the long encoder: the family's own number, or less where its tokenizer says so."""
        return min(longest, int(tokenizer.model_max_length)) if tokenizer is not None else longest

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Picture tokens down and across."""
        side = self.pipeline.vae_scale_factor * self.denoiser.config.patch_size
        return height // side, width // side

    @property
    def multiple(self) -> int:
        return int(self.pipeline.vae_scale_factor * self.denoiser.config.patch_size)


class PixArt(_Transformer):
    """PixArt-alpha and -sigma: T5, cross-attention under the padding's mask.

    Captions are lowered and stripped, not cleaned further; sizes are made as asked, without the pipelines' binning.
    """

    family: ClassVar[str] = "PixArt"
    pipelines: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    capabilities = frozenset({"pictures", "cross-attention", "guidance", "negative-prompt"})
    steps, guidance = 20, 4.5

    @property
    def _length(self) -> int:
        longest = 300 if "Sigma" in type(self.pipeline).__name__ else 120
        return self.text_length(self.pipeline.tokenizer, longest)

    def encoders(self) -> tuple[Encoder, ...]:
        return (Encoder("T5", self.pipeline.tokenizer, self._length, prepare=lambda p: p.lower().strip()),)

    def layers(self, height: int, width: int) -> tuple[Layer, ...]:
        blocks = self.denoiser.transformer_blocks
        return tuple(
            Layer(f"transformer_blocks.{i}.attn2", b.attn2, "cross", b.attn2.heads, *self.grid(height, width))
            for i, b in enumerate(blocks)
        )

    def encode(self, prompts: list[str], negative: str, guided: bool) -> Prompted:
        embeds, mask, negatives, negative_mask = self.pipeline.encode_prompt(
            prompts, guided, negative_prompt=negative, max_sequence_length=self._length
        )
        inputs = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if guided:
            inputs |= {"negative_prompt_embeds": negatives, "negative_prompt_attention_mask": negative_mask}
        return Prompted(embeds, inputs)

    def arguments(self, settings: Settings) -> dict[str, Any]:
        return {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}


class StableDiffusion3(_Transformer):
    """Stable Diffusion 3 and 3.5: the text axis is CLIP's 77 tokens, then T5's."""

    family: ClassVar[str] = "Stable Diffusion 3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    capabilities = frozenset({"pictures", "joint-attention", "guidance", "negative-prompt"})
    steps, guidance = 28, 7.0

    @property
    def _length(self) -> int:
        return self.text_length(self.pipeline.tokenizer_3, 256)

    def encoders(self) -> tuple[Encoder, ...]:
        pipeline = self.pipeline
        clip = pipeline.tokenizer_max_length
        found = [
            Encoder("CLIP 1", pipeline.tokenizer, clip),
            Encoder("CLIP 2", pipeline.tokenizer_2, clip),
        ]
        if pipeline.text_encoder_3 is not None:
            found.append(Encoder("T5", pipeline.tokenizer_3, self._length, start=clip))
        return tuple(found)

    def layers(self, height: int, width: int) -> tuple[Layer, ...]:
        blocks = self.denoiser.transformer_blocks
        return tuple(
            Layer(f"transformer_blocks.{i}.attn", b.attn, "joint", b.attn.heads, *self.grid(height, width))
            for i, b in enumerate(blocks)
        )

    def encode(self, prompts: list[str], negative: str, guided: bool) -> Prompted:
        embeds, negatives, pooled, pooled_negatives = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=guided,
            negative_prompt=negative,
            max_sequence_length=self._length,
        )
        inputs = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if guided:
            inputs |= {"negative_prompt_embeds": negatives, "negative_pooled_prompt_embeds": pooled_negatives}
        return Prompted(embeds, inputs)

    def arguments(self, settings: Settings) -> dict[str, Any]:
        return {"max_sequence_length": self._length}

    def refuse(self, settings: Settings) -> None:
        super().refuse(settings)
        most = self.denoiser.config.pos_embed_max_size
        if most and max(self.grid(settings.height, settings.width)) > most:
            raise RunError(
                f"pictures of {settings.width}x{settings.height} pixels",
                "larger than the model's table of places",
                f"sides of at most {most * self.multiple}",
            )

    def decode(self, latents: Tensor) -> Tensor:
        return _shifted(self.pipeline.vae, latents)


class Flux(_Transformer):
    """FLUX.1: T5 in the sequence, CLIP only pooled. Guidance is an input (dev) or distilled away (schnell)."""

    family: ClassVar[str] = "FLUX"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    capabilities = frozenset({"pictures", "joint-attention", "distilled-guidance"})
    steps, guidance = 28, 3.5

    def __init__(self, pipeline: Any, *args: Any, **kwargs: Any) -> None:
        if not pipeline.transformer.config.guidance_embeds:
            self.steps, self.guidance = 4, 1.0
            self.capabilities = self.capabilities - {"distilled-guidance"}
        super().__init__(pipeline, *args, **kwargs)

    @property
    def _length(self) -> int:
        longest = 512 if self.denoiser.config.guidance_embeds else 256
        return self.text_length(self.pipeline.tokenizer_2, longest)

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    @property
    def multiple(self) -> int:
        return int(self.pipeline.vae_scale_factor * 2)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Latents are packed two by two."""
        return height // self.multiple, width // self.multiple

    def guided(self, settings: Settings) -> bool:
        return False

    def encoders(self) -> tuple[Encoder, ...]:
        return (Encoder("T5", self.pipeline.tokenizer_2, self._length),)

    def layers(self, height: int, width: int) -> tuple[Layer, ...]:
        return tuple(
            Layer(f"{kind}.{i}.attn", b.attn, "joint", b.attn.heads, *self.grid(height, width), text_first=True)
            for kind in ("transformer_blocks", "single_transformer_blocks")
            for i, b in enumerate(getattr(self.denoiser, kind))
        )

    def encode(self, prompts: list[str], negative: str, guided: bool) -> Prompted:
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, None, max_sequence_length=self._length)
        return Prompted(embeds, {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def arguments(self, settings: Settings) -> dict[str, Any]:
        return {"max_sequence_length": self._length}

    def refuse(self, settings: Settings) -> None:
        super().refuse(settings)
        if settings.negative_prompt:
            raise RunError(
                f"the negative prompt {settings.negative_prompt!r}",
                "FLUX's guidance is distilled: it has no unconditional pass",
                "an empty negative prompt",
            )
        if settings.guidance > 1 and "distilled-guidance" not in self.capabilities:
            raise RunError(f"guidance {settings.guidance:g}", "this FLUX takes no guidance", "guidance 1")

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        return self.pipeline._unpack_latents(latents, height, width, self.pipeline.vae_scale_factor)  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        return _shifted(self.pipeline.vae, latents)


def _shifted(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(  # type: ignore[no-any-return]
        latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False
    )[0]
