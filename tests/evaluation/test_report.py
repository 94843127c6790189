"""The page of a run: its figures, numbers and texts are there, and it requests nothing from a network."""

import html as escaping
import json
import re
import shutil

import pytest

from jaxlinear import config as configs
from jaxlinear.evaluation import following, report
from jaxlinear.training import metrics
from jaxlinear.training.workdir import CONFIG, STARTS, read_config, read_starts
from tests.evaluation import test_html


@pytest.fixture(scope="module")
def page(tiny_run):
    return report.page(tiny_run, [("for x", "for x in <range>:\n  print")])


def test_what_it_says(page, tiny_run):
    test_html.assert_self_contained(page)
    lines = [line for line in metrics.read(tiny_run) if "loss" in line]
    assert f"<td>{lines[-1]['loss']:.4f} nats per token</td>" in page
    assert "<td>2 of 2</td>" in page
    assert len(re.findall("<svg", page)) >= 4
    config = re.search(r"Config</h2>\n<pre>(.*?)</pre>", page, re.DOTALL)[1]
    assert configs.from_json(escaping.unescape(config)) == read_config(tiny_run)
    assert "for x in &lt;range&gt;:" in page


def test_where_it_ran_is_noted_at_each_start(page, tiny_run):
    (start,) = read_starts(tiny_run)
    assert start["step"] == 0 and start["devices"] == 8 and start["platform"] == "cpu" and start["mesh"]["data"] == 8
    assert "<td>8 x cpu</td>" in page and f"jax {start['jax']}" in page
    assert (tiny_run / STARTS).read_text().count("\n") == 1


def test_an_evaluation_that_followed_the_run(tiny_run, monkeypatch, tmp_path):
    """Not the one of a step from which the run has since been set back, and which it may never reach again."""
    for step, starts in ((9, 1), (10, 1), (11, 0)):
        (tmp_path / f"{step}.json").write_text(json.dumps({"step": step, "starts": starts}))
    monkeypatch.setattr(following, "directory", lambda workdir: tmp_path)
    monkeypatch.setattr(report.evaluation, "table", lambda found: f"the table of {found['step']}")
    assert "<h2>Evaluation of step 10</h2>\n<pre>the table of 10</pre>" in report.page(tiny_run)


def test_a_run_without_losses(tiny_run, tmp_path):
    """An imported run, or one that has logged only a held-out loss: no curves, and everything else."""
    shutil.copy(tiny_run / CONFIG, tmp_path)
    parameters = re.search(r"<td>parameters</td><td>[\d,]+</td>", report.page(tiny_run))[0]
    page = report.page(tmp_path, [("for x", "for x in")])
    assert parameters in page and "for x in" in page and '"sequence_length": 32' in escaping.unescape(page)
    assert not re.search("<svg|Losses|How it went|<td>step</td>", page)
    (tmp_path / metrics.FILE).write_text('{"step": 1, "heldout_loss": 2.5}\n')
    page = report.page(tmp_path)
    assert "<h2>Losses</h2>" in page and "<td>2.5000</td>" in page and "<svg" not in page


def test_the_program(start, tiny_run, tmp_path):
    output = tmp_path / "page.html"
    done = start("report", f"--workdir={tiny_run}", f"--output={output}", "--prompt=for x", "--max_tokens=4")
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
    assert "After &#x27;for x&#x27;:" in output.read_text()
