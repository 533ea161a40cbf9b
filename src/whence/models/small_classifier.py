"""Builds a small, untrained BERT classifier of transformers from its config: several yes-or-no outputs for a sequence.

Its word embeddings are fixed orthonormal codes, not learned: what a word looks like at the input then says nothing of
what the model makes of it. Worlds train the rest; nothing in here is specific to a world.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

INITIAL = 0.1
"""Standard deviation of the first weights, near 1 / sqrt(width); BERT's own 0.02 is made for width 768."""
LOUD = 3.0
"""Values and their projection begin so much larger: the start token hears all words at once, each of them faintly, and
learns in fewer steps if it hears them better."""


def build_classifier(
    words: int, length: int, outputs: int, seed: int, *, layers: int = 2, width: int = 64, heads: int = 4
) -> Any:
    """A BertForSequenceClassification, the same for the same seed, in evaluation mode and with eager attention.

    ``words`` (at most ``width``) in the vocabulary, sequences of up to ``length`` tokens, ``outputs`` independent
    logits. ``width`` is a power of 2: the word codes are rows of a Hadamard matrix with columns of random sign.
    """
    import torch
    from scipy.linalg import hadamard
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=length,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=INITIAL,
        num_labels=outputs,
        problem_type="multi_label_classification",
        pad_token_id=None,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
        signs = torch.randint(0, 2, (width,)) * 2.0 - 1
        rows = torch.randperm(width)[:words]
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.value.weight.mul_(LOUD)
            layer.attention.output.dense.weight.mul_(LOUD)
        table.copy_(torch.as_tensor(hadamard(width), dtype=torch.float32)[rows] * signs / width**0.5)
    table.requires_grad_(False)
    return model.eval()


def logits(model: Any, embeddings: Tensor) -> Tensor:
    """logits[batch, output] of word embeddings [batch, token, width] (places are added by the model)."""
    found: Tensor = model(inputs_embeds=embeddings).logits
    return found


def attention(model: Any, embeddings: Tensor) -> Tensor:
    """Attention probabilities [batch, layer, head, query, key] of word embeddings [batch, token, width]."""
    import torch

    with torch.no_grad():
        return torch.stack(model(inputs_embeds=embeddings, output_attentions=True).attentions, 1)
