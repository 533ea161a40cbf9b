"""World `emoji`: 951 real captioned pictures, and a small text-to-image model trained on them."""

from pathlib import Path


def model_directory() -> Path:
    """The embedded model: a diffusers ``StableDiffusionPipeline`` directory inside the package."""
    return Path(__file__).parent / "model"
