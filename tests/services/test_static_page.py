"""How Chromium shows the static page without a network, on a phone, on a screen, in the dark.

Run: python -m helpers test tests/services/test_static_page.py
"""

import pytest
from support.jupyter import Axe, browser, need_chromium
from support.static_page import write_sample

VIEWS = [(420, "dark"), (1920, "light")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("pägé"))


@pytest.fixture(scope="module")
def chromium():
    need_chromium()
    with browser() as (context, _):
        yield context.browser


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def page(request, chromium, written):
    """Show the page in one width and theme; it may ask for nothing but itself and what it holds."""
    width, scheme = request.param
    requests = []
    with chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        page.on("request", lambda request: requests.append(request.url))
        page.goto(written.as_uri())
        page.wait_for_load_state("networkidle")
        yield page
        assert requests[0].startswith("file:")
        assert [url for url in requests[1:] if not url.startswith("data:")] == []


def test_axe_finds_nothing_serious(page):
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    found = Axe().run(page).response["violations"]
    assert [
        (one["id"], one["nodes"][0]["html"])
        for one in found
        if one["impact"] in ("serious", "critical")
    ] == []


def test_nothing_but_wide_parts_scrolls_sideways(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    scrolling = page.locator(".wide").evaluate_all(
        "all => all.filter(one => one.scrollWidth > one.clientWidth).map(one => one.ariaLabel)"
    )
    assert set(scrolling) == {"Code", "Output", "Table"}
    narrow = page.viewport_size["width"] == 420
    code = page.locator(".jp-InputArea-editor").bounding_box()
    assert code["width"] > 380 if narrow else code["width"] <= 800
    # A line of more than 90 letters is hard to read.
    assert (
        page.locator("p").last.evaluate(
            "one => one.clientWidth / parseFloat(getComputedStyle(one).fontSize)"
        )
        <= 45
    )


def test_the_contents_lead_to_the_headings(page):
    links = page.get_by_role("navigation", name="On this page").get_by_role("link")
    assert links.all_text_contents() == ["What's new & old?", "The end"]
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector(':target').textContent") == "The end"
    assert 0 <= page.get_by_role("heading", name="The end").bounding_box()["y"] < 900
    navigation = page.get_by_role("navigation").bounding_box()
    title = page.locator("h1").bounding_box()
    if page.viewport_size["width"] == 420:
        assert navigation["y"] > title["y"]
    else:
        assert navigation["x"] + navigation["width"] <= title["x"]


def test_the_text_reads_as_it_was_written(page):
    assert page.title() == "A page about models"
    assert page.get_by_role("main").count() == page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_text("It costs $5 and $6.").is_visible()
    assert page.get_by_alt_text("A red dot").evaluate("image => image.naturalWidth") == 1
    answer = page.locator("details", has_text="42")
    answer.locator("summary").press("Enter")
    assert answer.get_by_text("It is 42.").is_visible()


def test_a_dark_screen_gets_a_dark_page(chromium, written):
    with chromium.new_page(color_scheme="dark") as page:
        page.goto(written.as_uri())
        assert (
            page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
            == "rgb(13, 17, 23)"
        )
