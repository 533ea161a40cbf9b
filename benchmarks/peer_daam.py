"""Runs in the peer's environment: maps of nouns by the `daam` package, for word_maps.

Three of its constants are set by hand, since it hard-codes the latent area (64 x 64) and the number of tokens (77) and
reads nothing otherwise. Everything else is the package's own.
"""

import sys
import warnings

import numpy as np
import torch

warnings.simplefilter("ignore")
from daam import trace  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402

STEPS, GUIDANCE = 30, 2.0


def main(directory: str, jobs: str, out: str) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(
        directory, torch_dtype=torch.float32, use_safetensors=True, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    todo = np.load(jobs)
    area, tokens = pipe.unet.config.sample_size**2, pipe.tokenizer.model_max_length
    result, images = {}, []
    for i, (prompt, seed, nouns) in enumerate(zip(todo["prompts"], todo["seeds"], todo["nouns"], strict=True)):
        with torch.no_grad(), trace(pipe) as tc:
            tc.latent_hw = area
            for hook in tc.module:
                if hasattr(hook, "latent_hw"):
                    hook.latent_hw, hook.context_size = area, tokens
            made = pipe(
                str(prompt),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(int(seed)),
            )
            everything = tc.compute_global_heat_map()
            for noun in str(nouns).split():
                word = everything.compute_word_heat_map(noun)
                size = made.images[0].size[::-1]
                grown = torch.nn.functional.interpolate(word.heatmap.float()[None, None], size, mode="bicubic")
                result[f"{i}/{noun}"] = grown[0, 0].clamp(min=0).numpy()
            images.append(np.asarray(made.images[0]))
    np.savez(out, images=np.stack(images), **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
