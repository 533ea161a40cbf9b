"""ConceptAttention: truth in a wired model, then its equations in slow float64, then what must not matter."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.overrides import _len_torch_function_stack

from whence.engine.attention import AttentionTape
from whence.engine.concept_stream import ConceptStream
from whence.errors import MethodError, PromptError, RunError, WrongMapError
from whence.explanation import Cost, Explanation
from whence.inputs.concept_attention import CARD, ConceptAttention, embed
from whence.method import catalogue
from whence.models.loading import load
from whence.models.tiny import tiny
from whence.run import Run
from whence.worlds.controls import CONTROLS, shuffled
from whence.worlds.joint.trials import wired

PROMPT = "a red cat and a blue dog"
SIZE = {"height": 64, "width": 80}
SEEDS = 12


def sd35() -> Any:
    """Query and key norms, a second attention in the first block: Stable Diffusion 3.5."""
    pipeline = tiny("sd3", 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = dict(pipeline.transformer.config) | {
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
            "num_layers": 3,
        }
        pipeline.register_modules(transformer=SD3Transformer2DModel(**{k: v for k, v in config.items() if k[0] != "_"}))
    return pipeline


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        "sd3": load(tiny("sd3", 1)),
        "sd35": load(sd35()),
        "flux": load(tiny("flux", 1, layers=3)),
        "flux-schnell": load(tiny("flux-schnell", 1, layers=2)),
    }


@pytest.fixture(scope="module")
def runs(models: dict[str, Any]) -> dict[str, Run]:
    return {name: model.picture(PROMPT, seed=3, steps=2, **SIZE) for name, model in models.items()}


# --- truth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"softmax": False}, {"together": False}])
def test_in_the_wired_model_a_words_map_is_where_it_drew(settings: dict[str, bool]) -> None:
    assert wired(ConceptAttention(**settings).explain, SEEDS).mean >= CARD.falsifier["expect"]


@pytest.mark.parametrize("control", ["shuffled", *CONTROLS])
def test_controls_fail_the_wired_trial(control: str) -> None:
    explain = shuffled(ConceptAttention().explain) if control == "shuffled" else CONTROLS[control]
    assert wired(explain, SEEDS).mean < 0.75


def test_attention_probabilities_cannot_tell_the_silent_twin() -> None:
    def probabilities(run: Run) -> Explanation:
        tape = AttentionTape()
        assert run.model is not None
        run.model.generate(run.settings, tape=tape)
        maps = tape.layers()[0].values[0, 0].repeat_interleave(8, 1).repeat_interleave(8, 2)
        return Explanation("tape", run.words, maps.numpy(), ("word", "y", "x"), "", "probability", {}, Cost(1, 0))

    assert 2 / 3 <= wired(probabilities, SEEDS).mean < CARD.falsifier["expect"]


def test_the_card_is_read_without_importing_the_method() -> None:
    assert catalogue()["concept_attention"].falsifier == CARD.falsifier


# --- the equations, slowly, in float64 -------------------------------------------------------------------------------


def linear(x: Any, layer: Any) -> Any:
    out = x @ layer.weight.detach().double().numpy().T
    return out if layer.bias is None else out + layer.bias.detach().double().numpy()


def layer_norm(x: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms_norm(x: Any, norm: Any) -> Any:
    if norm is None:
        return x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm.weight.detach().double().numpy()


def modulation(temb: Any, layer: Any, parts: int) -> list[Any]:
    return np.split(linear(temb / (1 + np.exp(-temb)), layer), parts)


def rotate(x: Any, places: Any, axes: tuple[int, ...]) -> Any:
    """Rotary places: channel pairs (2i, 2i + 1) turned by place / 10000^(2i / size), axis after axis."""
    out, at = x.copy(), 0
    for axis, size in enumerate(axes):
        for i in range(0, size, 2):
            angle = places[:, axis] / 10000 ** (i / size)
            a, b = x[:, at + i], x[:, at + i + 1]
            out[:, at + i] = a * np.cos(angle) - b * np.sin(angle)
            out[:, at + i + 1] = a * np.sin(angle) + b * np.cos(angle)
        at += size
    return out


def attend(query: Any, keys: list[Any], values: list[Any]) -> Any:
    key, value = np.concatenate(keys), np.concatenate(values)
    logits = query @ key.T / np.sqrt(query.shape[1])
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ value


def feed_forward(x: Any, ff: Any) -> Any:
    hidden = linear(x, ff.net[0].proj)
    return linear(0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))), ff.net[2])


def reference(model: Any, run: Run, concepts: tuple[str, ...], softmax: bool, together: bool) -> Any:
    """phi [block, word, place], the mean over steps; the picture's and the prompt's tokens are the model's own."""
    denoiser = model.denoiser
    rotary = "Flux" in type(denoiser).__name__
    taken: list[tuple[Any, ...]] = []
    times: list[tuple[Any, ...]] = []
    hooks = [denoiser.time_text_embed.register_forward_pre_hook(lambda _, args: times.append(args))]
    for block in denoiser.transformer_blocks:
        hooks.append(
            block.register_forward_pre_hook(
                lambda _, __, kw: taken.append(tuple(kw[k][-1].double().numpy() for k in _INPUTS)), with_kwargs=True
            )
        )
    run.again()
    for hook in hooks:
        hook.remove()
    first = 0 if rotary else 1  # CLIP's texts begin with a start token, T5's with the word
    with torch.no_grad():
        start = np.stack([model.encode([c], "", False).condition[0, first].double().numpy() for c in concepts])
    embedder = copy.deepcopy(denoiser.time_text_embed).double()
    y, x = np.divmod(np.arange(80), 10)
    places = np.stack((0 * y, y, x), 1).astype(float)
    total = []
    for step, args in enumerate(times):
        blank = [a[-1:].double() for a in args[:-1]] + [torch.zeros_like(args[-1][-1:]).double()]
        with torch.no_grad():
            own = embedder(*blank)[0].numpy()
        c = linear(start, denoiser.context_embedder)
        for number, block in enumerate(denoiser.transformer_blocks):
            picture, text, temb = taken[step * len(denoiser.transformer_blocks) + number]
            attn, heads = block.attn, block.attn.heads

            def text_side(tokens: Any, emb: Any, block: Any = block) -> tuple[Any, list[Any]]:
                if block.attn.context_pre_only:
                    scale, shift = modulation(emb, block.norm1_context.linear, 2)
                    return layer_norm(tokens) * (1 + scale) + shift, []
                shift, scale, *rest = modulation(emb, block.norm1_context.linear, 6)
                return layer_norm(tokens) * (1 + scale) + shift, rest

            shift, scale, *_ = modulation(
                temb, block.norm1.linear, 9 if getattr(block, "use_dual_attention", False) else 6
            )
            normed = layer_norm(picture) * (1 + scale) + shift
            prompt, _ = text_side(text, temb)
            extra, rest = text_side(c, own)
            o_x, o_c = [], []
            for h in range(heads):
                part = slice(h * 16 if rotary else h * 8, (h + 1) * 16 if rotary else (h + 1) * 8)
                q_x, k_x, v_x = (linear(normed, p)[:, part] for p in (attn.to_q, attn.to_k, attn.to_v))
                q_x, k_x = rms_norm(q_x, attn.norm_q), rms_norm(k_x, attn.norm_k)
                if rotary:
                    q_x, k_x = (rotate(t, places, denoiser.config.axes_dims_rope) for t in (q_x, k_x))
                sides = []
                for tokens in (prompt, extra):
                    q, k, v = (linear(tokens, p)[:, part] for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
                    sides.append((rms_norm(q, attn.norm_added_q), rms_norm(k, attn.norm_added_k), v))
                (_, k_t, v_t), (q_c, k_c, v_c) = sides
                o_x.append(attend(q_x, [k_t, k_x], [v_t, v_x]))
                rows = [slice(None)] * len(c) if together else [slice(i, i + 1) for i in range(len(c))]
                o_c.append(
                    np.concatenate([attend(q_c[i : i + 1], [k_c[r], k_x], [v_c[r], v_x]) for i, r in enumerate(rows)])
                )
            outputs = np.concatenate(o_c, 1)
            phi = outputs @ np.concatenate(o_x, 1).T
            total.append(np.exp(phi) / np.exp(phi).sum(0) if softmax else phi)
            if rest:
                gate, shift_ff, scale_ff, gate_ff = rest
                c = c + gate * linear(outputs, attn.to_add_out)
                c = c + gate_ff * feed_forward(layer_norm(c) * (1 + scale_ff) + shift_ff, block.ff_context)
    return np.stack(total).reshape(len(times), -1, len(concepts), 80).mean(0)


_INPUTS = ("hidden_states", "encoder_hidden_states", "temb")


@pytest.mark.parametrize(("softmax", "together"), [(True, True), (False, False)])
@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "flux-schnell"])
def test_similarities_equal_the_equations(
    models: dict[str, Any], runs: dict[str, Run], name: str, softmax: bool, together: bool
) -> None:
    model, run, concepts = models[name], runs[name], ("cat", "forest", "blue")
    expected = reference(model, run, concepts, softmax, together)
    for block in range(len(expected)):
        stream = ConceptStream(embed(model, concepts), (block,), None, softmax, together)
        model.generate(run.settings, tape=stream)
        found = stream.similarities().flatten(1).double().numpy()
        assert np.ptp(expected[block]) > 1e-3
        np.testing.assert_allclose(found, expected[block], rtol=0, atol=2e-5 * np.abs(expected[block]).max())


# --- what must not matter --------------------------------------------------------------------------------------------


def leftovers(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.denoiser.modules())


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "flux-schnell"])
def test_the_picture_keeps_every_bit_and_no_hook_is_left(
    models: dict[str, Any], runs: dict[str, Run], name: str
) -> None:
    model, run = models[name], runs[name]
    again = model.generate(run.settings, tape=ConceptStream(embed(model, ("cat", "forest"))))
    assert (again.latents == run.latents).all()
    assert (again.images == run.images).all()
    assert leftovers(model) == 0


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_hooks_come_off_after_a_crash(models: dict[str, Any], runs: dict[str, Run], name: str) -> None:
    model = models[name]
    block = model.denoiser.transformer_blocks[0]
    calls = []

    def crash(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # the concepts' first feed-forward comes second, the second step's third
            raise KeyboardInterrupt

    handle = block.ff_context.register_forward_hook(crash)
    with pytest.raises(KeyboardInterrupt):
        ConceptAttention().explain(runs[name])
    handle.remove()
    assert leftovers(model) == 0
    assert _len_torch_function_stack() == 0
    assert runs[name].replays()


def maps(run: Run, *concepts: str, **settings: Any) -> dict[str, Any]:
    explanation = ConceptAttention(concepts or None, **settings).explain(run)
    return {label: explanation.map_of(label) for label in explanation.units.labels}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_apart_a_map_does_not_depend_on_the_other_concepts(runs: dict[str, Run], name: str) -> None:
    apart = {"softmax": False, "together": False}
    alone, among = maps(runs[name], "cat", **apart), maps(runs[name], "dog", "forest", "cat", "snow", **apart)
    np.testing.assert_allclose(alone["cat"], among["cat"], atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_together_a_map_depends_on_the_other_concepts_but_not_on_their_order(runs: dict[str, Run], name: str) -> None:
    one = maps(runs[name], "cat", "dog", "forest", softmax=False)
    two = maps(runs[name], "forest", "cat", "dog", softmax=False)
    for concept in one:
        np.testing.assert_allclose(one[concept], two[concept], atol=1e-5)
    assert abs(one["cat"] - maps(runs[name], "cat", softmax=False)["cat"]).max() > 1e-3


def test_a_picture_among_several_has_the_map_it_has_alone(models: dict[str, Any]) -> None:
    for name in ("sd3", "flux"):
        one = models[name].picture(PROMPT, seed=3, steps=2, **SIZE)
        two = models[name].picture(PROMPT, seed=3, steps=2, images=2, **SIZE)
        several = [ConceptAttention(softmax=False).explain(two, image=i).scores for i in (0, 1)]
        np.testing.assert_allclose(ConceptAttention(softmax=False).explain(one).scores, several[0], atol=1e-4)
        assert abs(several[0] - several[1]).max() > 1e-3


def test_the_conditional_rows_are_read_with_guidance_on_and_off(models: dict[str, Any]) -> None:
    model = models["sd3"]
    first = {"steps": (0,), "softmax": False}  # the first step sees the same noise, whatever the guidance
    plain, guided = (
        model.picture(PROMPT, seed=3, steps=2, guidance=g, negative_prompt="a small fox", **SIZE) for g in (1, 5)
    )
    np.testing.assert_allclose(
        ConceptAttention(**first).explain(plain).scores, ConceptAttention(**first).explain(guided).scores, atol=1e-4
    )


def test_steps_and_blocks_average(runs: dict[str, Run]) -> None:
    whole = ConceptAttention(layers=(0, 1)).explain(runs["flux"]).scores
    parts = [ConceptAttention(layers=(b,), steps=(s,)).explain(runs["flux"]).scores for b in (0, 1) for s in (0, 1)]
    np.testing.assert_allclose(whole, np.mean(parts, 0), atol=1e-5)


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_maps_have_the_size_of_the_picture_and_share_each_place(runs: dict[str, Run], name: str) -> None:
    explanation = ConceptAttention().explain(runs[name])
    assert explanation.kind == "output similarity"
    assert explanation.units == runs[name].words
    assert explanation.scores.shape == (7, 64, 80)
    np.testing.assert_allclose(explanation.scores.sum(0), 1, atol=1e-4)


def test_concepts_of_the_prompt_are_its_words_and_others_are_units_of_their_own(runs: dict[str, Run]) -> None:
    words = ConceptAttention(("dog", "a#2")).explain(runs["flux"]).units
    assert (words.kind, words.labels, words.members) == (
        "word", ("dog", "a#2"), tuple(runs["flux"].words.members[i] for i in (6, 4)),
    )  # fmt: skip
    others = ConceptAttention(("dog", "snow field")).explain(runs["flux"]).units
    assert (others.kind, others.labels) == ("concept", ("dog", "snow field"))


def test_blocks_are_the_authors_by_default(runs: dict[str, Run]) -> None:
    assert ConceptAttention().explain(runs["sd35"]).details["blocks"] == [0, 1, 2]
    assert ConceptAttention().explain(runs["flux"]).details["blocks"] == [2]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_unet_is_refused_and_told_what_would_work() -> None:
    run = load(tiny("sd")).picture("a red cat", steps=1)
    with pytest.raises(MethodError, match="daam or leave_one_out"):
        ConceptAttention().explain(run)


def test_a_run_without_its_model_is_refused(runs: dict[str, Run]) -> None:
    with pytest.raises(MethodError, match="load the model"):
        ConceptAttention().explain(replace(runs["sd3"], model=None))


def test_a_run_that_does_not_replay_is_refused(runs: dict[str, Run]) -> None:
    with pytest.raises(WrongMapError, match="another picture"):
        ConceptAttention().explain(replace(runs["sd3"], images=255 - runs["sd3"].images))


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"layers": (7,)}, WrongMapError, "numbers 0 to 1"),
        ({"layers": ()}, WrongMapError, "numbers 0 to 1"),
        ({"steps": (2,)}, WrongMapError, "2 denoiser passes"),
        ({"concepts": ()}, PromptError, "each concept once"),
        ({"concepts": ("cat", "cat")}, PromptError, "each concept once"),
        ({"concepts": ("cat", "?!")}, PromptError, "no words"),
    ],
)
def test_settings_that_fit_nothing_are_refused(
    runs: dict[str, Run], settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        ConceptAttention(**settings).explain(runs["sd3"])


def test_a_picture_that_is_not_there_is_refused(runs: dict[str, Run]) -> None:
    with pytest.raises(RunError, match="picture 1"):
        ConceptAttention().explain(runs["sd3"], image=1)
