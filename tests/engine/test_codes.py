"""Codecs: what is kept of a gradient in few bytes, and whether it still finds the example that matters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from whence.engine.codes import BLOCK, Codec, Factors, Numbers, Signs, factors, pack_signs, unpack_signs
from whence.engine.randomness import torch_stream
from whence.errors import RunError

SHAPES = {"attention": (16, 12), "mlp": (9, 7), "norm": (21, 1)}
CODECS: dict[str, Codec] = {
    "signs": Signs(SHAPES),
    "bare signs": Signs(SHAPES, scaled=False),
    "int8": Numbers(SHAPES),
    "float16": Numbers(SHAPES, "float16"),
    "rank 1": Factors(SHAPES),
    "rank 4": Factors(SHAPES, 4),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))


def drawn(n: int, *names: object, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    return {k: torch.randn(n, *s, generator=torch_stream("codes", k, *names)) for k, s in shapes.items()}


def outer(n: int, *names: object) -> dict[str, Tensor]:
    """Matrices of rank one, as the gradient of a linear layer at one token is."""
    columns = {k: (o, 1) for k, (o, _) in SHAPES.items()}
    rows = {k: (1, i) for k, (_, i) in SHAPES.items()}
    u, v = drawn(n, "u", *names, shapes=columns), drawn(n, "v", *names, shapes=rows)
    return {k: u[k] @ v[k] for k in SHAPES}


def inner(queries: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
    return sum((queries[k].flatten(1).double() @ gradients[k].flatten(1).double().T for k in SHAPES), torch.tensor(0.0))


# -- truth --------------------------------------------------------------------------------------------------------


@every_codec
def test_the_example_that_shares_the_querys_cause_comes_first_and_its_opposite_last(codec: Codec) -> None:
    examples, query = outer(500, "examples"), outer(1, "query")
    for k in SHAPES:  # equal norms: only the direction tells the planted ones from the others
        norms = examples[k][[123, 321]].flatten(1).norm(dim=1)[:, None, None]
        share = query[k] / query[k].norm() * norms * torch.tensor([1.0, -1.0])[:, None, None]
        examples[k][[123, 321]] = 0.9 * share + 0.44 * examples[k][[123, 321]]
    scores = codec.score(query, codec.encode(examples))[0]
    assert scores.argmax() == 123
    assert scores.argmin() == 321
    shuffled = {k: g.flatten(1)[:, torch.randperm(g[0].numel(), generator=torch_stream(k))] for k, g in query.items()}
    other = codec.score({k: g.view(1, *SHAPES[k]) for k, g in shuffled.items()}, codec.encode(examples))[0]
    assert other.argmax() != 123
    assert other.argmin() != 321


@every_codec
def test_a_score_is_the_inner_product_with_what_was_kept(codec: Codec) -> None:
    codes, queries = codec.encode(drawn(600, "x")), drawn(3, "q")
    assert codes.shape == (600, codec.stride)
    assert codes.dtype == np.uint8
    want = inner(queries, codec.decode(codes)).numpy()
    np.testing.assert_allclose(codec.score(queries, codes), want, atol=2e-6 * float(np.abs(want).max()))


def test_signs_of_gaussian_coordinates_correlate_with_the_exact_scores_as_theory_says() -> None:
    shapes = {"a": (1000,), "b": (1000,)}
    x, q = drawn(3000, "x", shapes=shapes), drawn(1, "q", shapes=shapes)
    exact = sum(q[k] @ x[k].T for k in shapes)
    found = np.corrcoef(exact[0], Signs(shapes).score(q, Signs(shapes).encode(x))[0])[0, 1]
    assert abs(found - np.sqrt(2 / np.pi)) < 0.03


def test_a_scale_for_each_example_and_layer_keeps_the_large_apart_from_the_small() -> None:
    x, q = drawn(400, "x"), drawn(1, "q")
    for i, g in enumerate(x.values()):
        g *= torch.exp(torch.randn(400, 1, 1, generator=torch_stream("size", i)))
    exact = inner(q, x)[0]
    scaled, bare = (
        np.corrcoef(exact, c.score(q, c.encode(x))[0])[0, 1] for c in (Signs(SHAPES), Signs(SHAPES, scaled=False))
    )
    assert scaled > bare + 0.1


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.5 / 127 * 1.01), ("float16", 2**-11 * 1.01)])
def test_numbers_come_back_within_their_rounding(kind: str, share: float) -> None:
    x = drawn(200, "x")
    back = Numbers(SHAPES, kind).decode(Numbers(SHAPES, kind).encode(x))
    for k, g in x.items():
        assert bool(((back[k] - g).abs().amax((1, 2)) <= share * g.abs().amax((1, 2))).all())


def test_signs_come_back_as_the_least_squares_fit() -> None:
    x = drawn(50, "x")
    for k, back in Signs(SHAPES).decode(Signs(SHAPES).encode(x)).items():
        torch.testing.assert_close(back, x[k].sign() * x[k].abs().mean((1, 2), keepdim=True), rtol=2**-8, atol=0)


def test_factors_keep_what_the_best_ones_keep() -> None:
    g = torch.randn(40, 24, 16, generator=torch_stream("g")) * torch.logspace(0, -2, 16)
    best = torch.linalg.svdvals(g)
    for rank in (1, 4):
        u, v = factors(g, rank)
        lost = (g - u @ v.mT).flatten(1).norm(dim=1) ** 2
        # Power iteration cannot tell directions of nearly the same strength; it loses little by that.
        assert bool((lost <= 1.1 * (best[:, rank:] ** 2).sum(1)).all())
    u, v = factors(g, 16)
    torch.testing.assert_close(u @ v.mT, g, rtol=1e-4, atol=1e-5)
    alone = outer(20, "alone")
    for k, back in Factors(SHAPES).decode(Factors(SHAPES).encode(alone)).items():
        assert float((back - alone[k]).norm() / alone[k].norm()) < 2**-7


def test_bits_lie_as_numpy_packs_them() -> None:
    x = torch.randn(9, 19, generator=torch_stream("bits"))
    packed = pack_signs(x)
    assert (packed == np.packbits(x.numpy() >= 0, axis=1, bitorder="little")).all()
    assert bool((unpack_signs(torch.from_numpy(packed))[:, :19] == torch.where(x >= 0, 1.0, -1.0)).all())


# -- invariance ---------------------------------------------------------------------------------------------------


@every_codec
def test_a_score_is_the_same_bit_for_bit_whatever_rows_stand_beside_it(codec: Codec) -> None:
    n = 2 * BLOCK + 88
    codes = codec.encode(drawn(n, "x"))
    for count in (1, 5):
        queries = drawn(count, "q", count)
        whole = codec.score(queries, codes)
        for size in (1, 77, BLOCK, BLOCK + 1):
            starts = range(0, n if size > 1 else 20, size)
            parts = np.concatenate([codec.score(queries, codes[s : s + size]) for s in starts], 1)
            assert (parts == whole[:, : parts.shape[1]]).all()


@every_codec
def test_threads_change_no_more_than_the_last_bits(codec: Codec) -> None:
    codes, queries = codec.encode(drawn(300, "x")), drawn(5, "q")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(codec.score(queries, codes))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6 * float(np.abs(found[0]).max()))


@every_codec
def test_an_example_is_encoded_the_same_alone_and_in_company(codec: Codec) -> None:
    x = drawn(40, "x")
    together = codec.encode(x)
    alone = np.concatenate([codec.encode({k: g[i : i + 1] for k, g in x.items()}) for i in range(40)])
    if isinstance(codec, Factors):  # of matrices: batched products may round differently
        kept, again = (codec.decode(c) for c in (together, alone))
        for k in SHAPES:
            torch.testing.assert_close(kept[k], again[k], rtol=0.05, atol=0.02)
    else:
        assert (together == alone).all()


@every_codec
def test_the_order_of_layers_the_kind_of_floats_and_a_journey_through_json_change_nothing(codec: Codec) -> None:
    x = {k: g.bfloat16().float() for k, g in drawn(20, "x").items()}
    codes = codec.encode(x)
    turned = {k: x[k] for k in reversed(x)}
    assert (codec.encode(turned) == codes).all()
    assert (codec.encode({k: g.double() for k, g in x.items()}) == codes).all()
    assert (codec.encode({k: g.bfloat16() for k, g in x.items()}) == codes).all()
    shapes = json.loads(json.dumps({k: SHAPES[k] for k in reversed(SHAPES)}))
    settings = {k: v for k, v in vars(codec).items() if k != "shapes"}
    again = type(codec)(shapes, **settings)
    assert again == codec
    assert (again.encode(x) == codes).all()


@every_codec
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_smallest_and_the_largest_gradients_are_kept_alike(codec: Codec, size: float) -> None:
    x, q = drawn(300, "x"), drawn(1, "q")
    scaled = codec.score(q, codec.encode({k: g * size for k, g in x.items()}))
    if isinstance(codec, Signs) and not codec.scaled:
        assert (scaled == codec.score(q, codec.encode(x))).all()
    else:
        assert np.corrcoef(scaled[0] / size, codec.score(q, codec.encode(x))[0])[0, 1] > 0.9999


@every_codec
def test_a_memory_mapped_block_is_read_without_being_written_to(codec: Codec, tmp_path: Path) -> None:
    codes = codec.encode(drawn(70, "x"))
    codes.tofile(tmp_path / "plane")
    mapped = np.memmap(tmp_path / "plane", np.uint8, mode="r", shape=codes.shape)
    queries = drawn(2, "q")
    assert (codec.score(queries, mapped[3:50]) == codec.score(queries, codes)[:, 3:50]).all()
    assert (codec.score(queries, torch.from_numpy(codes)[3:50]) == codec.score(queries, codes)[:, 3:50]).all()


@every_codec
def test_an_example_without_a_gradient_scores_nothing(codec: Codec) -> None:
    if isinstance(codec, Signs) and not codec.scaled:
        return  # bare signs have no nothing
    x = drawn(3, "x")
    for g in x.values():
        g[1] = 0
    assert codec.score(drawn(1, "q"), codec.encode(x))[0, 1] == 0


# -- shapes and refusals ------------------------------------------------------------------------------------------


def test_the_bytes_of_an_example_are_as_few_as_said() -> None:
    eight = {str(i): (128,) for i in range(8)}
    assert Signs(eight).stride == 128 + 16
    assert Signs({"all": (2048,)}, scaled=False).stride == 256
    assert Signs(SHAPES).stride == 6 + 24 + 8 + 3
    assert Numbers(eight).stride == 1024 + 16
    assert Numbers(eight, "float16").stride == 2048 + 16
    assert Factors({"a": (64, 32)}, 2).stride == 2 * 2 * 96
    assert Factors(SHAPES, 4).stride == 2 * (4 * 28 + 4 * 16 + 22)


@every_codec
def test_no_rows_give_no_scores(codec: Codec) -> None:
    assert codec.score(drawn(2, "q"), np.empty((0, codec.stride), np.uint8)).shape == (2, 0)


@every_codec
def test_what_cannot_be_kept_is_refused_with_the_rows_or_the_layers_named(codec: Codec) -> None:
    x = drawn(5, "x")
    x["mlp"][3, 0, 0] = float("nan")
    x["norm"][1, 0, 0] = float("inf")
    with pytest.raises(RunError, match="rows 1, 3"):
        codec.encode(x)
    with pytest.raises(RunError, match="attention"):
        codec.encode({k: g for k, g in drawn(5, "x").items() if k != "attention"})
    with pytest.raises(RunError, match="as many examples"):
        codec.encode({k: g[: 4 if k == "mlp" else 5] for k, g in drawn(5, "x").items()})
    with pytest.raises(RunError, match=f"rows of {codec.stride} bytes"):
        codec.score(drawn(1, "q"), np.zeros((4, codec.stride + 1), np.uint8))


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(RunError, match="int8, float16"):
        Numbers(SHAPES, "int4")
    with pytest.raises(RunError, match="no matrices"):
        Factors({"a": (8,)})
    with pytest.raises(RunError, match="no rank"):
        Factors(SHAPES, 0)
