"""World `shapes`: captioned scenes of coloured shapes with exact masks, an oracle, a small model trained on them."""

from pathlib import Path


def model_directory() -> Path:
    """The embedded model: a diffusers ``StableDiffusionPipeline`` directory inside the package."""
    return Path(__file__).parent / "model"
