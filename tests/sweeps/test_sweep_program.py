"""launch/sweep.py with launch/train.py. test_manager.py tests the rest of a sweep, with runs that cost nothing."""

import pytest

from tests.sweeps import killed_sweep


@pytest.mark.slow
def test_killed_in_its_second_run_it_trains_that_run_on_and_the_first_no_more(start, tiny_dataset, tmp_path):
    killed_sweep.check(tmp_path, tiny_dataset, 2)
    status = start("sweep", f"--workdir={tmp_path / 'sweep'}", "--status")
    assert (status.returncode, status.stderr) == (0, "")
    lines = status.stdout.splitlines()
    assert lines[0] == "2 runs: 2 finished" and lines[3].split()[:2] == ["finished", "6/6"]


@pytest.mark.parametrize(
    "key, refusal",
    [
        ("training.seed", "no dataset at no/data: "),  # the argument of the config
        ("training.sead", "there is no config key 'training.sead'; did you mean 'training.seed'?\n"),
    ],
)
def test_a_sweep_is_refused_before_anything_is_written(start, tmp_path, key, refusal):
    file = tmp_path / "small.py"
    text = killed_sweep.SWEEP.replace("KEY", key).replace("RUNS", "2").replace("get_config()", "get_config(path)")
    file.write_text(text.replace("    return config", "    config.data.path = path\n    return config"))
    done = start("sweep", f"--config={file}:no/data", f"--workdir={tmp_path / 'sweep'}")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(f"sweep.py: {refusal}")
    assert not (tmp_path / "sweep").exists()
