"""The documentation says what is true: the generated page is up to date, and every local link leads somewhere."""

import re
from pathlib import Path

import pytest

from jaxlinear import config as configs

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_configuration_page_is_that_of_the_keys():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == configs.markdown(), "run: python -m jaxlinear.config > docs/configuration.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_that_are_named_exist(page):
    named = set(re.findall(r"\b((?:launch|benchmarks|configs)/\w+\.py)\b", page.read_text())) - {"configs/NAME.py"}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
