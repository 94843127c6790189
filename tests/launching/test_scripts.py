"""What the schedulers are given, as the golden files hold it; ``python -m tests.launching.rewrite`` writes them anew."""

import dataclasses
import shlex
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


def test_sbatch_reads_values_whole():
    """By the rules of a shell, as sbatch does: a blank ends a value, # begins a comment."""
    values = {
        "comment": "two words",
        "partition": "a,b",
        "exclude": "n[1-3]",
        "mail-user": "it's #1",
        "reservation": "",
    }
    script = slurm.render(asked("h100:8"), options=values, log="/my runs/%j.log")
    lines = [shlex.split(line[8:], comments=True) for line in script.split("\n") if line.startswith("#SBATCH ")]
    assert all(len(line) == 1 for line in lines)
    read = dict(line.removeprefix("--").partition("=")[::2] for (line,) in lines)
    assert {name: read[name] for name in values} == values and read["output"] == "/my runs/%j.log"
    assert '\n#SBATCH --comment="two words"\n#SBATCH --partition=a,b\n' in script


@pytest.mark.parametrize(
    "visible, dealt",
    [(None, ["0,1", "2,3"]), ("4,5,6,7", ["4,5", "6,7"]), ("GPU-a,3,MIG-b,1,0", ["GPU-a,3", "MIG-b,1"])],
)
def test_gpus_are_dealt_out(tmp_path, monkeypatch, visible, dealt):
    """To two processes, which write down what they see."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nfor last; do :; done\nprintf "$CUDA_VISIBLE_DEVICES" > {tmp_path}/"$last"\n')
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.run(dataclasses.replace(asked("gpu:4"), python=str(program)), processes=2) == 0
    assert [(tmp_path / f"--process={i}").read_text() for i in range(2)] == dealt


@pytest.mark.parametrize("visible, count", [("0,1,2", 3), ("", 0)])
def test_fewer_gpus_than_asked_for(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    message = f"^CUDA_VISIBLE_DEVICES={visible} names {count} GPUs, --target=gpu:4 asks for 4; name as many, or ask for"
    with pytest.raises(UserError, match=message):
        local.run(asked("gpu:4"), processes=2)


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
        *(
            (
                lambda value=value: slurm.render(asked("h100:8"), options={"comment": value}),
                r"#SBATCH --comment: .* has a line break or a double quote; sbatch takes it without",
            )
            for value in ("a\nb", 'say "a"')
        ),
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
