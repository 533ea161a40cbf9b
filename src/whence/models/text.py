"""Adapters of transformers' language models: causal ones (GPT-2, Llama, Mistral, Qwen, Gemma, Mamba and whatever else
AutoModelForCausalLM loads) and encoder-decoders (T5, BART).

The tokenizer must be able to say which characters a token stands for: units are characters of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..engine.decoding import Choice, Chooser, Step, Trace, decode, draw, greedy, trace
from ..engine.randomness import torch_stream
from ..errors import MethodError, ModelError, PromptError, RunError
from ..text import TextRun, TextSettings

if TYPE_CHECKING:
    from ..segments import Segments
    from .text_question import PromptQuestion

Spans = list[tuple[int, int]]


class LanguageModel:
    """A causal language model and its tokenizer."""

    encodes = False
    """Whether the prompt is read by an encoder, and only the output by the decoder."""

    def __init__(self, model: Any, tokenizer: Any, name: str = "") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__}", "it cannot say which characters a token stands for",
                "the fast tokenizer of the same model (tokenizer.json)",
            )  # fmt: skip
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name = name or type(model).__name__
        self._fingerprint = ""

    @property
    def family(self) -> str:
        """Class of the model, without its ending."""
        return type(self.model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")

    @property
    def fingerprint(self) -> str:
        """Hash of configuration and weights; taken once."""
        if not self._fingerprint:
            digest = hashlib.sha256(self.model.config.to_json_string(use_diff=True).encode())
            for key, value in sorted(self.model.state_dict().items()):
                digest.update(key.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries that ran it."""
        import transformers

        return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}

    @property
    def length(self) -> int | None:
        """How many tokens the model can read and write together; None where nothing limits it."""
        config = self.model.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions"):
            if isinstance(getattr(config, name, None), int):
                return int(getattr(config, name))
        return None

    # -- text and tokens ----------------------------------------------------------------------------------------------

    def encode(self, text: str) -> tuple[list[int], Spans]:
        """Token numbers of a prompt, special ones included, and the characters [start, end) of each."""
        found = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids, spans = list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]
        if not ids:
            ids, spans = [self._begin()], [(0, 0)]
        return ids, spans

    def numbers(self, text: str) -> list[int]:
        """The token numbers of a prompt alone, which is quicker."""
        return list(self.tokenizer(text, verbose=False)["input_ids"]) or [self._begin()]

    def _begin(self) -> int:
        """What stands before the first token where a prompt has none."""
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self.tokenizer, name, None)
            if token is None:
                token = getattr(self.model.config, name, None)
            if isinstance(token, int):
                return token
        raise PromptError("an empty prompt", "this tokenizer has no token to begin with", "at least one word kept")

    def encode_output(self, text: str) -> tuple[list[int], Spans]:
        """The same of what follows a prompt: without special tokens."""
        found = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
        return list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]

    def _prompt(self, settings: TextSettings) -> str:
        if not settings.prompt.strip():
            raise PromptError("a prompt", "it is empty", "at least one word")
        if not settings.template:
            return settings.prompt
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptError("the chat template", f"the tokenizer of {self.name} has none", "the prompt as it stands")
        said = [{"role": "user", "content": settings.prompt}]
        text = self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        # The tokenizer would add its first token again.
        begin = self.tokenizer.bos_token
        return str(text).removeprefix(begin) if begin else str(text)

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, settings: TextSettings) -> TextRun:
        """Write the text of these settings, or score the forced one. Raises PromptError, RunError."""
        prompt = self._prompt(settings)
        ids, spans = self.encode(prompt)
        if settings.forced:
            output, output_spans = self.encode_output(settings.forced)
            text = settings.forced
            self._check_room(len(ids), len(output))
        else:
            self._check_room(len(ids), settings.max_tokens)
            output = self._generate(ids, settings, settings.max_tokens)
            text, output_spans = self._decode(output)
        if not output:
            raise RunError(f"write after {_short(prompt)!r}", "the model ended at once and wrote nothing",
                           "another prompt, or a text to score (forced)")  # fmt: skip
        run = TextRun(
            settings=settings, prompt=prompt, text=text, prompt_ids=np.array(ids), output_ids=np.array(output),
            prompt_spans=np.array(spans).reshape(-1, 2), output_spans=np.array(output_spans).reshape(-1, 2),
            logprobs=np.zeros(len(output)), model_name=self.name, family=self.family, fingerprint=self.fingerprint,
            versions=self.versions, model=self,
        )  # fmt: skip
        return replace(run, logprobs=self._score(ids, output))

    def _check_room(self, prompt: int, output: int) -> None:
        """Raise RunError or PromptError where so many tokens cannot be read and written."""
        if output < 1:
            raise RunError(f"write {output} tokens", "nothing to write", "1 or more")
        limit, asked = self.length, f"{prompt} tokens of prompt and {output} of output"
        if limit is None or (max(prompt, output) if self.encodes else prompt + output) <= limit:
            return
        if self.encodes:
            found, fits = f"{self.name} reads {limit} and writes {limit}", f"at most {limit} of each"
        elif output >= limit:
            found, fits = f"{self.name} reads {limit} in all", f"an output of less than {limit} tokens"
        else:
            found, fits = f"{self.name} reads {limit} in all", f"a prompt of at most {limit - output} tokens"
        raise PromptError(asked, found, f"{fits} (nothing is cut silently)")

    def _generate(self, ids: list[int], s: TextSettings, room: int) -> list[int]:
        """The written tokens, without the one that ends the text."""
        stop = self._stop()
        written = [int(t) for t in decode(self.model, ids, chooser(s), room, stop).output_ids]
        return written[:-1] if written and written[-1] in stop else written

    def _stop(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {e for e in (ends if isinstance(ends, list) else [ends]) if e is not None}

    def trace(self, run: TextRun) -> Trace:
        """How each token of a run was chosen."""
        return trace(self.model, run.prompt_ids.tolist(), run.output_ids.tolist(), run.settings.top_p)

    def _decode(self, ids: Sequence[int]) -> tuple[str, Spans]:
        """The text of written tokens and the characters of each. Bytes that are no character yet count to the token
        that completes them."""
        if not ids:
            return "", []
        texts = [self.tokenizer.decode(ids[: i + 1], skip_special_tokens=True) for i in range(len(ids))]
        ends, last = [], 0
        for text in texts:
            last = max(last, len(text.rstrip("�")))
            ends.append(last)
        ends[-1] = len(texts[-1])
        return texts[-1], list(zip([0, *ends[:-1]], ends, strict=True))

    def _score(self, ids: list[int], output: list[int]) -> Any:
        from ..engine.ablate import Ablation, Version

        return Ablation(self.model).logprobs([Version(tuple(ids), tuple(output))])[0]

    def question(self, run: TextRun, segments: Segments, **choices: Any) -> PromptQuestion:
        """What made the model write this span? See :class:`~whence.models.text_question.PromptQuestion`."""
        from .text_question import PromptQuestion

        return PromptQuestion(self, run, segments, **choices)


def chooser(s: TextSettings) -> Chooser:
    """The likeliest token; with a seed one drawn from the nucleus (Holtzman et al. 2020) by a stream of our own, so
    that the same seed writes the same on every device."""
    if s.seed is None:
        return greedy
    if not (s.temperature > 0 and 0 < s.top_p <= 1):
        found = f"temperature {s.temperature:g}, top_p {s.top_p:g}"
        raise RunError("draw tokens", found, "a temperature above 0, top_p above 0 and at most 1")
    g = torch_stream("text", s.seed)

    def choose(step: Step) -> Choice:
        law = (step.logits / s.temperature).softmax(-1)
        uniform = float(torch.rand((), generator=g, dtype=torch.float64))
        return Choice(draw(law, s.top_p, uniform), law, draw=uniform)

    return choose


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"...{text[-most:]}"


class EncoderDecoder(LanguageModel):
    """A model whose encoder reads the prompt and whose decoder writes (T5, BART)."""

    encodes = True

    @property
    def family(self) -> str:
        """Class of the model, without its ending."""
        return type(self.model).__name__.removesuffix("ForConditionalGeneration")

    @property
    def length(self) -> int | None:
        """How many tokens the encoder can read, and the decoder write; None where places are only relative (T5)."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        return most if isinstance(most, int) else None

    @property
    def start(self) -> int:
        """What the decoder reads first."""
        return int(self.model.config.decoder_start_token_id)

    def _generate(self, ids: list[int], s: TextSettings, room: int) -> list[int]:
        device = next(self.model.parameters()).device
        stop, choose = self._stop(), chooser(s)
        output: list[int] = []
        with torch.inference_mode():
            read = self.model.get_encoder()(input_ids=torch.tensor([ids], device=device))
            while len(output) < room:
                written = torch.tensor([[self.start, *output]], device=device)
                logits = self.model(encoder_outputs=read, decoder_input_ids=written).logits[0, -1].double().cpu()
                chosen = choose(Step(len(output), (*ids, *output), logits))
                token = chosen if isinstance(chosen, int) else chosen.token
                if token in stop:
                    break
                output.append(token)
        return output

    def trace(self, run: TextRun) -> Trace:
        """Raises MethodError: the decoding desk reads decoders alone."""
        raise MethodError(
            "a decoding trace", f"{self.family} reads its prompt by an encoder", "a causal language model"
        )

    def _score(self, ids: list[int], output: list[int]) -> Any:
        from ..engine.ablate import Version
        from .seq2seq import EncoderAblation

        return EncoderAblation(self.model, self.start).logprobs([Version(tuple(ids), tuple(output))])[0]
