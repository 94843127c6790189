"""launch/sweep.py with launch/train.py. test_manager.py tests the rest of a sweep, with runs that cost nothing."""

import subprocess
import sys

from tests.sweeps import killed_sweep
from tests.training import tiny


def test_killed_in_its_second_run_it_trains_that_run_on_and_the_first_no_more(tiny_dataset, tmp_path):
    killed_sweep.check(tmp_path, tiny_dataset, 2)
    command = [sys.executable, "launch/sweep.py", f"--workdir={tmp_path / 'sweep'}", "--status"]
    status = subprocess.run(command, cwd=tiny.REPOSITORY, capture_output=True, text=True)
    assert (status.returncode, status.stderr) == (0, "")
    lines = status.stdout.splitlines()
    assert lines[0] == "2 runs: 2 finished" and lines[3].split()[:2] == ["finished", "6/6"]


def test_the_config_of_a_sweep_may_have_an_argument(tmp_path):
    file = tmp_path / "small.py"
    text = killed_sweep.SWEEP.replace("KEY", "training.seed").replace("RUNS", "2")
    file.write_text(text.replace("get_config()", "get_config(path)").replace("    return config", PATH_OF_DATA))
    command = [sys.executable, "launch/sweep.py", f"--config={file}:no/data", f"--workdir={tmp_path / 'sweep'}"]
    done = subprocess.run(command, cwd=tiny.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("sweep.py: no dataset at no/data: ")


PATH_OF_DATA = "    config.data.path = path\n    return config"


def test_an_unknown_key_is_refused_before_anything_is_written(tiny_dataset, tmp_path):
    process = killed_sweep.start(tmp_path, tiny_dataset, key="training.sead")
    output, errors = process.communicate(timeout=killed_sweep.PATIENCE)
    assert (process.returncode, output) == (2, "")
    assert errors == "sweep.py: there is no config key 'training.sead'; did you mean 'training.seed'?\n"
    assert not (tmp_path / "sweep").exists()
