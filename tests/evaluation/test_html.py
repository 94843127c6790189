"""Pages in one file: their content is escaped, and nothing in them links outside."""

import re
from html.parser import HTMLParser

import pytest

from jaxlinear.evaluation import html

SVG = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1">
<metadata><rdf about="http://example.org"/></metadata>
<defs><clipPath id="p1"><path d="M0 0"/></clipPath><path id="dot" d="M0 0"/></defs>
<g clip-path="url(#p1)"><use xlink:href="#dot"/></g></svg>"""


class Reader(HTMLParser):
    """Collects the attributes and text of a page, and whether its tags close."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in ("meta", "link", "use", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def assert_self_contained(page):
    """Every reference on the page leads into the page, and every id occurs once."""
    read = Reader(page)
    assert read.open == []
    ids = [value for name, value in read.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    references = [value for name, value in read.attributes if name in ("href", "src", "xlink:href")]
    inside = {value.removeprefix("#") for value in references if value.startswith("#")}
    inside |= set(re.findall(r"url\(#([^)]*)\)", page))
    assert [value for value in references if not value.startswith("#")] == ["data:,"]
    assert inside <= set(ids)
    assert "http" not in page and "@import" not in page and "<script" not in page
    return read


def test_a_page_asks_for_nothing():
    page = html.page("A < B", html.figure(SVG, "one & only", name="one"), html.figure(SVG, "two", name="two"))
    read = assert_self_contained(page)
    assert [value for name, value in read.attributes if name == "id"] == ["one-p1", "one-dot", "two-p1", "two-dot"]
    assert page.startswith("<!doctype html>")
    assert read.text.count("A < B") == 2 and "one & only" in read.text


def test_text_and_tables_are_escaped():
    parts = html.heading("<h>"), html.paragraph("a<b>"), html.preformatted("x & y"), html.table(["<n>"], [["<3"]])
    read = assert_self_contained(html.page("t", *parts))
    for text in ("<h>", "a<b>", "x & y", "<n>", "<3"):
        assert text in read.text


def test_what_is_no_table_or_figure():
    with pytest.raises(ValueError, match="a row of 1 cells under 2 names"):
        html.table(["a", "b"], [["1"]])
    with pytest.raises(ValueError, match="not an SVG document"):
        html.figure("<p>", "", name="x")
