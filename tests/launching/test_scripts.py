"""What the schedulers are given, as the golden files hold it; ``python -m tests.launching.rewrite`` writes them anew."""

import subprocess

import pytest
import yaml

from jaxlinear.errors import UserError
from jaxlinear.launching import gke, local, request, slurm, tpu_vm
from jaxlinear.training.loop import PREEMPTED
from tests.launching.rewrite import ARGUMENTS, CASES, GOLDEN, asked


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    assert CASES[name]() == (GOLDEN / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(".sh")])
def test_the_shell_reads_it(name):
    found = subprocess.run(["bash", "-n"], input=CASES[name](), text=True, capture_output=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_a_job_goes_back_into_the_queue_by_its_status(tmp_path):
    """The script run here, with stand-ins for SLURM's commands."""
    for name, text in {"srun": 'exit "$STATUS"', "scontrol": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = CASES["slurm.sh"]().replace("module load cuda", "true")
    for status, said in ((PREEMPTED, "requeue 17\n"), (0, ""), (1, "")):
        environment = {"PATH": f"{tmp_path}:/bin:/usr/bin", "STATUS": str(status), "SLURM_JOB_ID": "17"}
        found = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=environment, check=False)
        assert (found.returncode, found.stdout) == (status, said)


def test_a_manifest_starts_one_pod_a_host():
    manifest = yaml.safe_load(CASES["gke_tpu.yaml"]())
    (hosts,) = manifest["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 8
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"][-1].endswith("--expect=tpu:32")


def test_the_status_of_a_preempted_run_is_that_of_the_loop():
    assert request.PREEMPTED == PREEMPTED


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: asked("v9:2"), "there is no target 'v9:2'"),
        (lambda: asked("h100:12"), "h100:12: more than 8 devices are whole hosts of as many"),
        (lambda: asked("h100:8", ["--config=x.py"]), "the training command has no --workdir"),
        (lambda: asked("h100:8", name="No Name"), "--name='No Name' is no name for a job"),
        (
            lambda: slurm.render(asked("v5e:2x4")),
            "SLURM runs on GPUs here, not on v5e:2x4; --platform=tpu_vm, gke or local may",
        ),
        (lambda: slurm.render(asked("cpu:2")), "SLURM runs on GPUs here, not on cpu:2"),
        (lambda: gke.render(asked("cpu:2"), image="i"), "GKE needs to know which nodes: v5e, .*, not cpu:2"),
        (lambda: gke.render(asked("gpu:8"), image="i"), "GKE needs to know which nodes: .*, not gpu:8"),
        (lambda: gke.render(asked("h100:8"), image=""), "--platform=gke needs --image"),
        (lambda: tpu_vm.render(asked("h100:8"), zone="z", project="p", setup="s"), "--platform=tpu_vm is for TPUs"),
        (
            lambda: tpu_vm.render(asked("v5e:2x4"), zone="z", project=None, setup="s"),
            "--platform=tpu_vm needs --project",
        ),
        (lambda: local.run(asked("cpu:3"), processes=2), "--processes=2 does not divide 3 devices"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_name_is_the_work_directorys():
    assert asked("h100:8", [*ARGUMENTS[:1], "--workdir=/runs/Griffin_100M.b/"]).name == "griffin-100m-b"
