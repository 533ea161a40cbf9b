"""The page in a browser: what a person sees when pointing at a word, with scripts and without."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Browser

from whence.report.bundle import Bundle, write_report

if not PROGRAM:
    warnings.warn("no chromium here: the report page was not looked at in a browser", stacklevel=1)
pytestmark = pytest.mark.skipif(not PROGRAM, reason="no chromium: the report page was not looked at in a browser")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    b = Browser(tmp_path_factory.mktemp("profile"))
    yield b
    b.close()


@pytest.fixture(scope="module")
def page(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(bundle, tmp_path_factory.mktemp("report") / "out") / "report.html"


SHOWN = """[...document.querySelectorAll({!r})].filter(e => getComputedStyle(e).visibility == 'visible')
.map(e => e.className)"""


def shown(browser: Browser, selector: str) -> list[str]:
    found = browser.value(SHOWN.format(selector))
    return [c.split()[-1].removeprefix("of-") for c in found]


@pytest.mark.parametrize("scripts", [True, False], ids=["with scripts", "without scripts"])
def test_pointing_at_a_word_shows_its_map_and_leaving_brings_the_chosen_one_back(
    browser: Browser, page: Path, scripts: bool
) -> None:
    browser.show(page, scripts=scripts)
    assert shown(browser, ".veils img") == ["w2"]  # red, the first supported word
    browser.point(".pick-w7")
    assert shown(browser, ".veils img") == ["w7"]
    browser.point("footer")
    assert shown(browser, ".veils img") == ["w2"]
    browser.point(".pick-w7", press=True)
    browser.point("footer")
    assert shown(browser, ".veils img") == ["w7"]
    assert shown(browser, ".panel") == ["m0"]
    browser.point("label[for=none]", press=True)
    browser.point("footer")
    assert shown(browser, ".veils img") == []


def test_keys_move_from_word_to_word(browser: Browser, page: Path) -> None:
    browser.show(page)
    browser.value("document.getElementById('w2').focus()")
    browser.key("ArrowRight")
    assert shown(browser, ".veils img") == ["w3"]


@pytest.mark.parametrize("scripts", [True, False], ids=["with scripts", "without scripts"])
def test_a_press_changes_the_method(browser: Browser, page: Path, scripts: bool) -> None:
    browser.show(page, scripts=scripts)
    browser.point("label[for=m1]", press=True)
    assert shown(browser, ".panel") == ["m1"]
    assert browser.value("getComputedStyle(document.querySelector('.only-m1')).display") == "block"
    assert browser.value("getComputedStyle(document.querySelector('.only-m0')).display") == "none"


def test_the_slider_is_there_with_scripts_only_and_sets_the_strength(browser: Browser, page: Path) -> None:
    strength = "document.getElementById('strength')"
    browser.show(page, scripts=False)
    assert browser.value(f"getComputedStyle({strength}).display") == "none"
    browser.show(page)
    browser.value(f"({strength}.value = 30, {strength}.dispatchEvent(new Event('input')))")
    assert browser.value("getComputedStyle(document.querySelector('.veil')).opacity") == "0.3"


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_moves_when_another_word_is_shown_and_nothing_runs_off_the_side(
    browser: Browser, page: Path, width: int
) -> None:
    browser.show(page, width=width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    height = browser.value("document.documentElement.scrollHeight")
    for word in ("w0", "w3", "none"):
        browser.value(f"document.getElementById('{word}').click()")
        assert browser.value("document.documentElement.scrollHeight") == height


def test_the_page_asks_for_nothing_but_itself(browser: Browser, page: Path) -> None:
    browser.show(page, dark=True)
    asked = [u for u in browser.requests if not u.startswith("data:")]
    assert asked == [page.as_uri()]
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 20, 19)"
