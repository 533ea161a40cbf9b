import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from synthetic import SCENE, make_bundle, make_run

from whence.method import card_of
from whence.readout import Readout
from whence.report.bundle import Bundle
from whence.report.fragments import explanation_html, plot_parts, run_html, style, verdict_html
from whence.report.page import page_html, prompt_pieces
from whence.report.palettes import PALETTES, colour
from whence.report.pictures import common_range, map_uri, overlay
from whence.score import Score
from whence.verdict import unmeasured


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def __call__(self, tag: str, within: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.found if t == tag and (not within or within in (a.get("class") or "").split())]


@pytest.fixture(scope="module")
def page(bundle: Bundle) -> str:
    return page_html(bundle)


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


# Truth -------------------------------------------------------------------------------------------------------------


def test_all_maps_of_a_method_are_drawn_on_one_scale(bundle: Bundle, page: str) -> None:
    for k, e in enumerate(bundle.explanations):
        veils = Elements(page.split(f'class="veils of-m of-m{k}"')[1].split("</div>")[0])("img", "veil")
        assert len(veils) == len(e.units)
        low, high = common_range(e.scores)
        drawn = np.stack([pixels(v["src"] or "") for v in veils]).astype(float) / 255 * (high - low) + low
        assert abs(drawn - np.clip(e.scores, low, high)).max() < (high - low) / 255


def test_each_word_wears_the_verdict_of_the_method_that_is_shown(bundle: Bundle, page: str) -> None:
    heading = page.split("<h1")[1].split("</h1>")[0].split("</label>")
    for i, label in enumerate(bundle.run.words.labels):
        for k, e in enumerate(bundle.explanations):
            tag = next(t for t in Elements(heading[i])("span", "tag") if f"of-m{k}" in (t["class"] or ""))
            found = bundle.verdicts(e.method, label)
            assert (tag["class"] or "").split()[-1] == (found[0].word if found else "untried")


def test_every_number_of_a_verdict_is_on_the_page(bundle: Bundle, page: str) -> None:
    v = bundle.verdicts("daam", "red")[0]
    for x in (v.effect, *v.interval, v.control, v.beyond):
        assert f"{x:.3g}".replace("-", "−") in page
    assert v.claim.replace("'", "&#39;") in page
    assert str(v.details["intervention"]).replace("'", "&#39;") in page


def test_interval_plots_keep_order_and_share_one_axis(bundle: Bundle) -> None:
    for t in bundle.trials:
        parts = plot_parts(t.verdict)
        if not t.verdict.n:
            assert parts is None
            continue
        assert parts
        places = {parts["zero"]: 0.0, parts["delta"]: t.verdict.delta}
        values = [(t.verdict.effect, t.verdict.interval), (t.verdict.control, t.verdict.control_interval)]
        for row, (at, ends) in zip(parts["rows"], values, strict=False):
            places |= {row["at"]: at, row["low"]: ends[0], row["high"]: ends[1]}
        x = np.array(sorted(places.items()))
        assert (x[:, 0] >= 0).all()
        assert (x[:, 0] <= 100).all()
        slope = (x[-1, 1] - x[0, 1]) / (x[-1, 0] - x[0, 0])
        assert np.allclose(x[:, 1], x[0, 1] + slope * (x[:, 0] - x[0, 0]), atol=0.01 * slope + 1e-9)


def test_differences_show_where_the_replaced_picture_differs(bundle: Bundle, page: str) -> None:
    c = next(c for c in bundle.counterfactuals if (c.word, c.replacement) == ("circle", "square"))
    figure = next(f for f in page.split("<figure>") if f'alt="the picture for: {c.prompt}"' in f)
    before, after = (np.asarray(x, int) for x in (bundle.picture, c.image))
    images = Elements(figure)("img")
    assert (pixels(images[0]["src"] or "") == c.image).all()
    assert ((pixels(images[1]["src"] or "") > 0) <= (before != after).any(-1)).all()
    assert pixels(images[1]["src"] or "").max() > 0


def test_an_overlay_is_the_grey_picture_where_the_map_is_low_and_the_palette_where_it_is_high() -> None:
    picture = np.full((8, 8, 3), (200, 40, 40), np.uint8)
    scores = np.zeros((8, 8), np.float32)
    scores[2:4, 2:4] = 1
    drawn = overlay(picture, scores, (0.0, 1.0)).astype(int)
    assert np.ptp(drawn[7, 7]) <= 1
    assert abs(drawn[2, 2] - 0.85 * colour(np.array(1.0)).astype(int)).max() < 0.15 * 100


@pytest.mark.parametrize("name", ["viridis", "cividis", "inferno"])
def test_palettes_grow_lighter_all_the_way(name: str) -> None:
    rgb = colour(np.linspace(0, 1, 64), name) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    assert (np.diff(linear @ [0.2126, 0.7152, 0.0722]) > -1e-3).all()
    assert name in PALETTES


def contrast(a: str, b: str) -> float:
    def light(h: str) -> float:
        rgb = np.array([int(h[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_in_both_themes() -> None:
    css = str(style("parts.css"))
    themes = [
        dict(re.findall(r"--(\w+):(#\w{6})", block)) for block in css.split("@media (prefers-color-scheme:dark)")[:2]
    ]
    assert len(themes) == 2
    for theme in themes:
        for ink in ("ink", "soft", "supported", "refuted", "undecided"):
            assert contrast(theme[ink], theme["paper"]) >= 4.5, (ink, theme)
            assert contrast(theme[ink], theme["wash"]) >= 4.5, (ink, theme)


# Invariances -------------------------------------------------------------------------------------------------------


def test_a_prompt_cannot_write_into_the_page() -> None:
    prompt = "<script>alert(1)</script> \"red\" & <img src=x onerror=alert(1)> 'circle'"
    b = make_bundle(prompt)
    for text in (page_html(b), run_html(b.run), explanation_html(b.explanations[0])):
        assert "alert(1)</script>" not in text
        assert "<img src=x" not in text
    assert "&lt;img src=x" in page_html(b)
    assert "whence explain --prompt &#39;&lt;script" in page_html(b)


@pytest.mark.parametrize(
    "prompt",
    [SCENE.caption, "a red, red circle!", "  two  Red  circles ", "l'été: “ein” Kreis-Bild (rot)", "?? red ??"],
)
def test_the_prompt_stands_on_the_page_letter_for_letter(prompt: str) -> None:
    pieces = prompt_pieces(Bundle(make_run(prompt), []))
    assert "".join(text for text, _ in pieces) == prompt
    assert [i for _, i in pieces if i is not None] == list(range(len(make_run(prompt).words)))


def test_maps_larger_than_the_page_needs_are_made_smaller_and_keep_their_mean() -> None:
    scores = np.random.default_rng(0).random((512, 256)).astype(np.float32)
    drawn = pixels(map_uri(scores, (0.0, 1.0)))
    assert drawn.shape == (128, 64)
    assert abs(drawn.mean() / 255 - scores.mean()) < 0.01


# Shape -------------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_little_space(bundle: Bundle, page: str) -> None:
    elements = Elements(page)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
    assert all((a["src"] or "").startswith("data:image/") for a in elements("img"))
    assert not elements("link")
    assert len(bundle.run.words) == 12
    assert len(page) < 1_500_000


def test_every_picture_has_words_in_its_place(page: str) -> None:
    images = Elements(page)("img")
    assert images
    assert all((a.get("alt") or "").strip() for a in images)


def test_all_is_there_without_scripts(bundle: Bundle, page: str) -> None:
    bare = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    elements = Elements(bare)
    assert [a["id"] for a in elements("input") if a.get("name") == "word"] == [f"w{i}" for i in range(12)] + ["none"]
    panels = elements("section", "panel")
    assert len(panels) == 12 * 2
    for name in ("claim", "evidence", "intervention", "verdict"):
        assert bare.count(f"<dt>{name}</dt>") >= len(panels)
    for i in range(12):
        assert f"#w{i}:checked~* .of-w{i}{{visibility:inherit}}" in bare
        assert f".pick-w{i}:hover) .of-w{i}{{visibility:inherit}}" in bare


def test_the_recipe_says_how_to_make_it_again(bundle: Bundle, page: str) -> None:
    assert "--prompt &#39;a large red circle" in page
    for text in ("--seed 7", "--steps 20", "--guidance 4", "--size 64x64", bundle.run.fingerprint, "torch 2.13.0"):
        assert text in page


def test_nouns_draw_themselves_from_the_same_parts(bundle: Bundle) -> None:
    drawn = [bundle.run._repr_html_(), bundle.explanations[1]._repr_html_(), bundle.trials[-1].verdict._repr_html_()]
    score = Score.of("pointing", "share of pictures", [1.0, 0.5, 0.0, 1.0], world="shapes")
    drawn += [noun._repr_html_() for noun in (bundle.explanations[1].units, score, Readout("red", "pixels", np.mean))]
    drawn += [card_of(name)._repr_html_() for name in ("daam", "lds", "implicit_attention")]
    assert Score.of("one", "", [0.5])._repr_html_()  # without an interval
    assert "pointing" in drawn[4]
    assert drawn[4].count("<circle") == 4
    for text in drawn:
        assert text.startswith('<div class="whence"')
        assert "<script" not in text
        assert "//" not in re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text)
    assert "supported" in verdict_html(bundle.verdicts("daam", "red")[0])
    assert (
        "no alternative is known" in verdict_html(unmeasured("c", "this run", "no alternative is known", 0.1)).lower()
    )


def test_a_bundle_without_explanations_or_trials_is_a_page_too() -> None:
    run = make_run("a red circle", images=3)
    page = page_html(Bundle(run, []))
    assert "No claim on this page was put on trial" in page
    assert page.count("image-3.png") >= 1
