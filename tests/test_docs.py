"""The documentation is true to the code: the generated page is up to date, and every local link leads somewhere."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxlinear import config as configs
from jaxlinear import ops
from jaxlinear.errors import UserError

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_that_is_shown_imports_what_it_names(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        imports = re.findall(r"^import (jaxlinear\.\w+)", block, re.MULTILINE)
        assert set(re.findall(r"(?<!from )\bjaxlinear\.\w+(?=[.(])", block)) <= set(imports)


def test_the_table_of_operations_has_their_backends():
    """The backends that each operation lists when it refuses one."""
    x, heads = jnp.ones((1, 2, 4)), jnp.ones((1, 2, 1, 4))
    kernel, bias, first = jnp.ones((1, 4, 4)), jnp.ones(4), jnp.ones((1, 2), bool)
    gates = kernel, bias, kernel, bias, bias
    calls = {
        "linear_recurrence": lambda: ops.linear_recurrence(x, x, backend="none"),
        "selective_scan": lambda: ops.selective_scan(x, x, None, x, x, backend="none"),
        "rg_lru": lambda: ops.rg_lru(x, *gates, first, backend="none"),
        "rg_lru_gates": lambda: ops.rg_lru_gates(x, *gates, first, backend="none"),
        "linear_attention": lambda: ops.linear_attention(heads, heads, heads, backend="none"),
        "delta_rule": lambda: ops.delta_rule(heads, heads, heads, heads[..., 0], backend="none"),
        "sliding_window_attention": lambda: ops.sliding_window_attention(heads, heads, heads, window=2, backend="none"),
        "causal_attention": lambda: ops.causal_attention(heads, heads, heads, backend="none"),
    }
    rows = (ROOT / "docs" / "mixers.md").read_text().split("\n")
    for name, call in calls.items():
        with pytest.raises(UserError, match=f"{name} has no backend 'none'; it has 'auto'") as refused:
            call()
        (row,) = (row for row in rows if row.startswith("| `") and f"`{name}`" in row.split("|")[1] and " | `" in row)
        assert re.findall(r"`(\w+)`", row.split("|")[3]) == re.findall(r"'(\w+)'", str(refused.value))[2:]
