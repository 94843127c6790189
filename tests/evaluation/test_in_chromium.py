"""Pages of a run, its evaluations and a sweep, opened in headless Chromium: complete, without errors or requests.

The browser is the one that the environment's ``CHROMIUM`` names, or the one on the path.
"""

import os
import shutil

import pytest

from jaxlinear.evaluation import following, options, report
from jaxlinear.sweeps.laws import comparison
from jaxlinear.sweeps.laws import report as laws_report
from tests.sweeps import test_comparison

pytestmark = pytest.mark.slow

SIZES = {"a desk": (1280, 800), "a phone": (390, 800)}


@pytest.fixture(scope="module")
def chromium():
    from playwright import sync_api

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "there is no chromium here; name one: CHROMIUM=/path/to/chromium"
    with sync_api.sync_playwright() as playwright:
        # CI runs as root, for whom Chromium has no sandbox; the pages are our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tiny_run, tmp_path_factory):
    """The pages' paths, by what the pages show."""
    directory = tmp_path_factory.mktemp("pages")
    run = directory / "run.html"
    run.write_text(report.page(tiny_run, [("for x", "for x in <range>:\n  print")]), encoding="utf-8")
    assert len(list(following.follow(tiny_run, ["perplexity"], options.Options(batches=1)))) == 2
    found = comparison.compare(test_comparison.ladder(), replicates=20)
    sweep = laws_report.write(found, directory / "sweep", title="A ladder")[-1]
    return {"run": run, "evaluations": following.directory(tiny_run) / following.PAGE, "sweep": sweep}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["run", "evaluations", "sweep"])
def test_a_page_is_whole_and_asks_for_nothing(chromium, pages, name, size):
    width, height = SIZES[size]
    page = chromium.new_page(viewport={"width": width, "height": height})
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    address = pages[name].resolve().as_uri()
    page.goto(address, wait_until="networkidle")
    assert [url for url in requests if not url.startswith("data:")] == [address]
    assert messages == []
    assert page.title() == page.locator("h1").inner_text()
    figures = page.locator("svg")
    boxes = [figures.nth(i).bounding_box() for i in range(figures.count())]
    assert len(boxes) >= 2 and all(box["width"] > 200 and box["height"] > 100 for box in boxes)
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes), "a figure is cut off"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than its window"
    page.close()
