"""World `facts`: short texts with facts in the context and facts known by heart, and a small language model of them."""

from pathlib import Path


def model_directory() -> Path:
    """The embedded model: a transformers ``LlamaForCausalLM`` directory inside the package."""
    return Path(__file__).parent / "model"


def twin_directory() -> Path:
    """Its memory-free twin: the same model trained on, so that it knows no town of birth by heart."""
    return Path(__file__).parent / "twin"
