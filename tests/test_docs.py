"""The documentation is true to the code: the generated page is up to date, every local link leads somewhere, and the Python
that is shown runs."""

import contextlib
import functools
import io
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxlinear import config as configs
from jaxlinear import ops
from jaxlinear.errors import UserError
from jaxlinear.sweeps.laws import bootstrap

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

# What the examples of a page take as given.
TOKENS = jnp.ones((1, 8), jnp.int32)
SIZES = [(size, size * ratio) for size in (1e6, 3e6, 1e7, 3e7) for ratio in (5, 20, 80)]
GIVEN = {
    "checkpoints.md": {"tokens": TOKENS, "more_tokens": TOKENS},
    "scaling.md": {
        "parameters": [size for size, _ in SIZES],
        "tokens": [tokens for _, tokens in SIZES],
        "losses": [1.8 + 480 / size**0.35 + 2100 / tokens**0.37 for size, tokens in SIZES],
    },
}


def python_of(page):
    """The examples of a page, without those marked ``python no-run``: they need devices, or a long run."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def anchors_of(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_configuration_page_is_that_of_the_keys():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == configs.markdown(), "run: python -m jaxlinear.config > docs/configuration.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_and_programs_that_are_named_exist(page):
    missing = []
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)]+))?\)", page.read_text()):
        if "://" not in target:
            path = page.parent / target if target else page
            if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors_of(path)):
                missing.append((target, anchor))
    named = set(re.findall(r"\b((?:launch|benchmarks|configs)/\w+\.py)\b", page.read_text())) - {"configs/NAME.py"}
    assert not missing and all((ROOT / name).exists() for name in named), (missing, named)


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.name)
def test_python_that_is_shown_runs(page, tiny_run, tiny_dataset, tmp_path, monkeypatch):
    """All examples of a page, one after another, where the quickstart's run and its data are a tiny run and its data."""
    for name, target in {"runs/quickstart": tiny_run, "data/stdlib": tiny_dataset}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bootstrap, "fit_law", functools.partial(bootstrap.fit_law, replicates=20))
    names = {"__name__": page.stem, **GIVEN.get(page.name, {})}
    for block in python_of(page):
        # Modules that other tests have imported would hide an import that the example lacks.
        assert set(re.findall(r"(?<!from )\bjaxlinear\.\w+(?=[.(])", block)) <= set(
            re.findall(r"^import (jaxlinear\.\w+)", block, re.M)
        )
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, str(page), "exec"), names)


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
