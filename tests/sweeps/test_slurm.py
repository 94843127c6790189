"""Sweeps under SLURM, with stand-ins for its commands: sbatch runs a script at once, sacct knows which ones have ended."""

import contextlib
import os
import signal
import stat
import sys

import pytest

from jaxlinear.errors import UserError
from jaxlinear.sweeps import executors, manager, states
from jaxlinear.sweeps.runner import TrainingJob
from jaxlinear.sweeps.sweep import prepare, read
from tests.sweeps import stand_in

SBATCH = """
number = 1 + len(list(jobs.glob("*.sh")))
script = pathlib.Path(sys.argv[1]).read_text()
(jobs / f"{number}.sh").write_text(script)
environment = {**os.environ, "SLURM_JOB_ID": str(number), "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
command = f"bash {jobs / f'{number}.sh'}; touch {jobs / f'{number}.over'}"
nowhere = subprocess.DEVNULL  # or who called sbatch would wait for the job
subprocess.Popen(["bash", "-c", command], env=environment, start_new_session=True, stdout=nowhere, stderr=nowhere)
print(f"Submitted batch job {number}")
"""
SRUN = """
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    arguments = arguments[2 if arguments[0] in ("--output", "--error") else 1:]
sys.exit(subprocess.call(arguments))
"""
SACCT = """
print("JobID|State|NodeList")
for script in jobs.glob("*.sh"):
    state = "COMPLETED" if script.with_suffix(".over").exists() else "RUNNING"
    print(f"{script.stem}|{state}|here")
"""
SCONTROL = '(jobs / "requeued").open("a").write(sys.argv[2] + "\\n")'


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The directory with the scripts of submitted jobs."""
    directory, programs = tmp_path / "slurm", tmp_path / "bin"
    directory.mkdir()
    programs.mkdir()
    for name, body in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scontrol": SCONTROL}.items():
        head = f"#!{sys.executable}\nimport os, pathlib, subprocess, sys\njobs = pathlib.Path({str(directory)!r})\n"
        (programs / name).write_text(head + body)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(stand_in.ROOT))
    monkeypatch.chdir(stand_in.ROOT)
    return directory


@contextlib.contextmanager
def sweep(directory, dataset, plan, *, options=("time=60",)):
    with prepare(directory, stand_in.config(dataset), plan) as planned:
        executor = executors.Slurm(planned.directory / "jobs" / "submitit", parallel=None, options=options)
        yield manager.Manager(planned, executor, stand_in.TRAIN)


def steps(directory):
    return [list(map(int, path.read_text().split())) for path in directory.glob("runs/*/steps.txt")]


ALL = list(range(1, stand_in.STEPS + 1))


def test_the_runs_are_jobs_with_the_options_that_were_given(jobs, tiny_dataset, tmp_path):
    options = ["time=90", "partition=gpu", "--gpus-per-node=8", "ntasks-per-node=1"]
    with sweep(tmp_path / "sweep", tiny_dataset, stand_in.runs([0, stand_in.BROKEN]), options=options) as runs:
        assert runs.run(lambda table: None, poll=0.1) == 1
    found = dict(runs.progress())
    assert [run.state for run in found.values()] == [states.FINISHED, states.FAILED]
    assert found[f"seed={stand_in.BROKEN}"].error == "stand_in: this seed is broken"
    script = (jobs / "1.sh").read_text().splitlines()
    for line in ("partition=gpu", "gpus-per-node=8", "time=90", "ntasks-per-node=1", "job-name=seed=0", "nodes=1"):
        assert f"#SBATCH --{line}" in script
    assert read(tmp_path / "sweep").runs[0].files.attempts()[0]["job"] == "1"


def test_jobs_outlive_their_manager_and_are_found_again(jobs, tiny_dataset, tmp_path):
    def stop(table):
        first._stop = True

    hold = tmp_path / "sweep" / stand_in.HOLD
    hold.parent.mkdir()
    hold.write_text("0")
    with sweep(tmp_path / "sweep", tiny_dataset, stand_in.runs([0, 1])) as first:
        assert first.run(stop, poll=0.1) == 75
    assert len(list(jobs.glob("*.sh"))) == 2
    with sweep(tmp_path / "sweep", tiny_dataset, stand_in.runs([0, 1, 2])) as again:
        assert again.run(lambda table: hold.unlink(missing_ok=True), poll=0.1) == 0
    assert len(list(jobs.glob("*.sh"))) == 3, "the runs 0 and 1 were not submitted again"
    assert steps(tmp_path / "sweep") == [ALL] * 3


def test_a_preempted_job_saves_itself_and_asks_to_be_requeued(jobs, tiny_dataset, tmp_path):
    """SLURM sends USR2 before it reclaims the machine."""

    def preempt(table):
        attempts = run.files.attempts()
        if not told and attempts and table[0][1].step >= 2:
            told.append(os.kill(attempts[0]["pid"], signal.SIGUSR2))

    told = []
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / stand_in.HOLD).write_text("0")  # until it is told to stop
    with sweep(tmp_path / "sweep", tiny_dataset, stand_in.runs([0])) as runs:
        (run,) = read(tmp_path / "sweep").runs
        # A job that asks SLURM to requeue it exits; nothing starts it again here, so the manager submits a new one.
        assert runs.run(preempt, poll=0.05) == 0
    assert (jobs / "requeued").read_text() == "1\n"
    assert [tried["status"] for tried in run.files.attempts()] == [75, 0]
    assert steps(tmp_path / "sweep") == [ALL]


def test_a_job_may_be_preempted_before_it_begins():
    """It happens between the installation of submitit's handlers and the call; the same job is requeued."""
    job = TrainingJob("sweep", "seed=0", ["train"], {"CUDA_VISIBLE_DEVICES": None})
    assert job.checkpoint().function == TrainingJob("sweep", "seed=0", ["train"], {"CUDA_VISIBLE_DEVICES": None})


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "needs the time limit of a job in minutes: --sbatch=time=MINUTES"),
        (["time=1:00:00"], "--sbatch=time=1:00:00: it must be a whole number of minutes"),
        (["time=²"], "--sbatch=time=²: it must be a whole number of minutes"),
        (["time=60", "--time=90"], "--sbatch=--time=90: time is given twice; leave one out"),
        (["time=60", "partition"], "--sbatch=partition: write an option of sbatch and its value"),
    ],
)
def test_options_that_are_refused(jobs, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        executors.Slurm(tmp_path, parallel=None, options=options)


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"srun.*; --executor=local runs on this machine"):
        executors.Slurm(tmp_path, parallel=None, options=["time=60"])
