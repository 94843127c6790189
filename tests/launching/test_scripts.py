"""What the schedulers are given, as the golden files hold it; ``python -m tests.launching.rewrite`` writes them anew."""

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from jaxlinear.errors import UserError
from jaxlinear.launching import gke, local, request, slurm, tpu_vm
from jaxlinear.training.loop import PREEMPTED
from tests.launching.rewrite import ARGUMENTS, CASES, GOLDEN, asked
from tests.training.tiny import REPOSITORY


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


def stand_in(file, *lines):
    """A program of shell in place of another; its path."""
    file.write_text("\n".join(("#!/bin/bash", *lines, "")))
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    "ends, status, starts",
    [
        (("exit 75", "exit 0"), 75, 3),
        (("exit 75", "exit 2"), 2, 1),
        (("exit 1", "exit 75"), 1, 1),
        (("kill -9 $$", "exit 75"), 137, 1),
        (("exit 0", "exit 0"), 0, 1),
    ],
)
def test_a_run_goes_on_if_none_of_its_processes_failed(tmp_path, monkeypatch, ends, status, starts):
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:  # enough: as a person would end it
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(local.time, "sleep", pause)
    log = tmp_path / "log"
    cases = (f"--process={i}) echo >> {log}; {end};;" for i, end in enumerate(ends))
    program = stand_in(tmp_path / "python", "for last; do :; done", 'case "$last" in', *cases, "esac")
    request = dataclasses.replace(asked("cpu:2"), python=program)
    assert local.run(request, processes=2, requeue=True) == status
    assert len(log.read_text().splitlines()) == 2 * len(pauses or [0])
    assert pauses == ([local._PAUSE] * 2 if starts == 3 else [])


def test_told_to_end_between_two_starts(tmp_path, monkeypatch):
    """Both processes are: the first, which was not yet known, and the one that comes later."""
    start, begun = subprocess.Popen, []

    def begin(*arguments, **options):
        begun.append(start(*arguments, **options))
        if len(begun) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", begin)
    request = dataclasses.replace(asked("cpu:2"), python=stand_in(tmp_path / "python", "exec sleep 10"))
    assert local.run(request, processes=2) == 128 + signal.SIGTERM
    assert [process.returncode for process in begun] == [-signal.SIGTERM] * 2


@pytest.mark.parametrize("visible, count", [("0,1,2", 3), ("", 0)])
def test_fewer_gpus_than_asked_for(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    message = f"^CUDA_VISIBLE_DEVICES={visible} names {count} GPUs, --target=gpu:4 asks for 4; name as many, or ask for"
    with pytest.raises(UserError, match=message):
        local.run(asked("gpu:4"), processes=2)


def of_slurm(tmp_path, statuses, refused=0, script="slurm.sh"):
    """The script run here once for each of these statuses of srun, with stand-ins for SLURM's commands; scontrol is
    refused so often. How the last one ended, and what it and the stand-ins said."""
    log, script = tmp_path / "log", CASES[script]().replace("module load cuda", "true")
    (tmp_path / "refused").write_text("x\n" * refused)
    stand_in(tmp_path / "srun", f'echo "srun $SRUN_CPUS_PER_TASK $1 $2" >> {tmp_path}/srun.log', 'exit "$STATUS"')
    stand_in(tmp_path / "sleep", f'echo "sleep$1" >> {log}')
    stand_in(
        tmp_path / "scontrol",
        f'echo "$@" >> {log}; cd {tmp_path}',
        '[ -s refused ] && sed -i 1d refused && echo "connect failure" >&2 && exit 1',
        "exit 0",
    )
    for status in statuses:
        log.write_text("")
        environment = {"PATH": f"{tmp_path}:/bin:/usr/bin", "STATUS": str(status), "SLURM_JOB_ID": "17"}
        found = subprocess.run(
            ["bash"], input=script, text=True, capture_output=True, env=environment, cwd=tmp_path, check=False
        )
    return found.returncode, log.read_text(), found.stderr


@pytest.mark.parametrize(
    "statuses, said",
    [
        ([PREEMPTED], "requeue 17\n"),
        ([0], ""),
        ([2], ""),
        ([1], "requeue 17\n"),
        ([134] * 20, "requeue 17\n"),
        ([134] * 20 + [PREEMPTED] * 30, "requeue 17\n"),
        ([134] * 20 + [0] + [134], "requeue 17\n"),
    ],
)
def test_a_job_goes_back_into_the_queue_by_its_status(tmp_path, statuses, said):
    assert of_slurm(tmp_path, statuses) == (statuses[-1], said, "")


def test_a_job_that_always_fails_ends(tmp_path):
    """Preemptions between its failures are not counted."""
    status, said, errors = of_slurm(tmp_path, [134, PREEMPTED] * 20 + [1])
    assert (status, said) == (1, "")
    assert errors.startswith("the run failed with status 1, after 20 restarts (griffin-17.failures); sbatch it again")


@pytest.mark.parametrize("status", [PREEMPTED, 134])
def test_a_controller_that_is_away_for_a_while(tmp_path, status):
    ended, said, _ = of_slurm(tmp_path, [status], refused=2)
    assert (ended, said.split("\n")) == (status, ["requeue 17", "sleep15", "requeue 17", "sleep30", "requeue 17", ""])
    ended, said, errors = of_slurm(tmp_path, [status], refused=99)
    assert (ended, said.count("requeue")) == (status, 6)
    assert errors.endswith("SLURM did not take the job back into the queue; sbatch it again, and the run goes on\n")


def test_cpus_of_a_process(tmp_path):
    """srun does not know what sbatch was told of them; else the processes share those of the node."""
    of_slurm(tmp_path, [0])
    of_slurm(tmp_path, [0], script="slurm_by_host.sh")
    read = (tmp_path / "srun.log").read_text()
    assert read == "srun  --kill-on-bad-exit=0 --cpu-bind=none\nsrun 24 --kill-on-bad-exit=0 python\n"
    assert "\n#SBATCH --cpus-per-task=24\n" in CASES["slurm_by_host.sh"]()
    given = slurm.render(asked("h100:8"), options={"cpus-per-task": "7"}, cpus_per_task=8)
    assert "\nexport SRUN_CPUS_PER_TASK=7\n" in given and "=8\n#" not in given.partition("gpus-per-node=8\n")[2]


@pytest.mark.parametrize(
    "target, options, lines",
    [
        ("h100:16", {}, ["exclusive", "mem=0"]),
        ("h100:4", {}, []),
        ("h100:8", {"exclusive": "user"}, ["mem=0", "exclusive=user"]),
        ("h100:4", {"exclusive": None}, ["exclusive"]),
        ("h100:8", {"mem": "64G", "requeue": None}, ["exclusive", "mem=64G"]),
        ("h100:8", {"mem-per-gpu": "64G", "oversubscribe": None}, ["mem-per-gpu=64G", "oversubscribe"]),
    ],
)
def test_sbatch_is_told_each_thing_once(target, options, lines):
    """Whole nodes are the run's alone, and what the user says takes the place of what is said for all."""
    script = slurm.render(asked(target), options=options)
    read = [line.removeprefix("#SBATCH --") for line in script.split("\n") if line.startswith("#SBATCH ")]
    names = [line.partition("=")[0] for line in read]
    assert len(set(names)) == len(names) and read.count("requeue") == 1
    assert [line for line in read if line.startswith(("exclusive", "mem", "oversubscribe"))] == sorted(
        lines, key=read.index
    )


GONE, NO_NETWORK = "!NOT_FOUND: Resource 'griffin' was not found", "!Could not reach the server"
REMAINS = "gcloud compute tpus queued-resources delete griffin-96db98 --zone=us-east5-a --project=mine --force"


def of_tpu_vm(tmp_path, states, ends, create=(), delete=(), **options):
    """The script for TPU VMs run here, with a stand-in for gcloud that goes through these states, and ends of ssh, create
    and delete (0 when there are no more). Its status, what it did, and what it said."""
    log = tmp_path / "log"
    for name, values in {"describe": states, "ssh": ends, "create": create, "delete": delete}.items():
        (tmp_path / name).write_text("".join(f"{value}\n" for value in values))
    stand_in(tmp_path / "sleep", f'echo "sleep$1" >> {log}')
    stand_in(
        tmp_path / "gcloud",
        f"cd {tmp_path}",
        'next() { head -n 1 "$1"; sed -i 1d "$1"; }',
        '[ "$5" = describe ] || echo "$5" >> log',
        'case "$5" in',
        "describe) said=$(next describe)",
        '[ -n "$said" ] || { echo "no more states" >> log; kill "$(cat script)"; }',
        '[ "${said#!}" = "$said" ] && echo "$said" && exit',
        'echo "${said#!}" >&2; exit 1;;',
        '*) status=$(next "$5"); exit "${status:-0}";;',
        "esac",
    )
    script = tpu_vm.render(asked("v5p:4x4x4"), zone="us-east5-a", project="mine", setup="true", **options)
    environment = {"PATH": f"{tmp_path}:/bin:/usr/bin"}
    found = subprocess.run(
        ["bash"],
        input=f"echo $$ > {tmp_path}/script\n{script}",
        text=True,
        capture_output=True,
        env=environment,
        timeout=60,
        check=False,
    )
    return found.returncode, log.read_text().split(), [line for line in found.stderr.split("\n") if line]


@pytest.mark.parametrize(
    "states, ends, status, done",
    [
        (["ACTIVE"], [0, 0], 0, "ssh ssh"),
        ([GONE, "PROVISIONING", "ACTIVE"], [0, 0], 0, "create sleep30 sleep30 ssh ssh"),
        ([NO_NETWORK, "ACTIVE"], [0, 0], 0, "sleep30 ssh ssh"),
        (["ACTIVE"], [0, 2], 2, "ssh ssh"),
        (["ACTIVE", NO_NETWORK, "ACTIVE"], [0, 255, 0, 0], 0, "ssh ssh sleep60 sleep30 ssh ssh"),
        (
            ["ACTIVE", "SUSPENDING", "SUSPENDED", GONE, "ACTIVE"],
            [0, 255, 0, 0],
            0,
            "ssh ssh sleep60 sleep30 delete sleep30 create sleep30 ssh ssh",
        ),
        # A connection that is lost while the slice is there, and a host that saved itself and is not taken away.
        *((["ACTIVE"] * 2, [0, end, 0, 0], 0, "ssh ssh sleep60 ssh ssh") for end in (255, 1, PREEMPTED)),
        # What is left of a run whose slice is taken away crashes.
        (
            ["ACTIVE", "SUSPENDING", "SUSPENDED", GONE, "ACTIVE"],
            [0, 134, 0, 0],
            0,
            "ssh ssh sleep60 delete sleep30 create sleep30 ssh ssh",
        ),
    ],
)
def test_a_slice_is_asked_for_again(tmp_path, states, ends, status, done):
    ended, did, errors = of_tpu_vm(tmp_path, states, ends)
    assert (ended, did) == (status, done.split())
    assert errors == [
        *[NO_NETWORK[1:]] * (NO_NETWORK in states),
        f"griffin-96db98: a slice that is still there is paid for; this deletes it: {REMAINS}",
    ]


def test_a_run_that_fails_is_started_again(tmp_path):
    """So many times; between them connections may be lost as often as they like."""
    ended, did, errors = of_tpu_vm(tmp_path, ["ACTIVE"] * 6, [0, 134, 0, 255, 0, 101, 0, 0], restarts=2)
    assert (ended, did) == (0, ["ssh", "ssh", *["sleep60", "ssh", "ssh"] * 3])
    assert errors[0] == "griffin-96db98: the run failed with status 134 (1 times, at most 2)"
    ended, did, errors = of_tpu_vm(tmp_path, ["ACTIVE"] * 6, [0, 134] * 3, restarts=2)
    assert ended == 134
    assert errors[-2:] == [
        "griffin-96db98: the run failed with status 134 (3 times, at most 2)",
        f"griffin-96db98: a slice that is still there is paid for; this deletes it: {REMAINS}",
    ]


@pytest.mark.parametrize(
    "states, ends, create, delete, did, said",
    [
        ([GONE] * 3, [], [1] * 3, [], "create sleep60 sleep30 create sleep120 sleep30 create", "the slice was refused"),
        (
            ["SUSPENDED"] * 3,
            [],
            [],
            [1] * 3,
            "delete sleep60 sleep30 delete sleep120 sleep30 delete",
            "it could not be",
        ),
        (
            ["FAILED", GONE, "FAILED", GONE, "FAILED"],
            [],
            [],
            [],
            "delete sleep60 sleep30 create sleep30 delete sleep120 sleep30 create sleep30 delete",
            "the request for the slice failed",
        ),
        (["ACTIVE"] * 3, [255] * 3, [], [], "ssh sleep60 ssh sleep120 ssh", "the hosts could not be set up"),
    ],
)
def test_what_google_refuses_is_asked_for_again(tmp_path, states, ends, create, delete, did, said):
    """With pauses; when it is granted at last the run begins, and if not it ends."""
    ended, done, errors = of_tpu_vm(tmp_path, states, ends, create, delete, restarts=2)
    assert (ended, done) == (1, did.split())
    assert errors[-2].startswith(f"griffin-96db98: {said}") and errors[-2].endswith(" (3 in a row, at most 2)")
    assert errors[-1].endswith(REMAINS)
    (tmp_path / "log").unlink()
    ended, done, errors = of_tpu_vm(tmp_path, [*states, "ACTIVE"], [*ends, 0, 0], create, delete, restarts=3)
    assert (ended, done[-2:]) == (0, ["ssh", "ssh"])


def test_the_slice_of_a_finished_run_may_be_deleted(tmp_path):
    ended, did, errors = of_tpu_vm(tmp_path, ["ACTIVE"], [0, 0], delete=[1, 0], delete_when_done=True)
    assert (ended, did) == (0, ["ssh", "ssh", "delete", "sleep60", "delete"])
    assert errors == ["griffin-96db98: it could not be deleted (1 in a row, at most 20)"]
    (tmp_path / "log").unlink()
    ended, did, errors = of_tpu_vm(tmp_path, ["ACTIVE"], [0, 2], delete_when_done=True)
    assert (ended, did) == (2, ["ssh", "ssh"]) and errors[-1].endswith(REMAINS)


def test_two_runs_whose_work_directories_end_alike_have_two_slices():
    def script(workdir):
        arguments = [*ARGUMENTS[:1], f"--workdir={workdir}"]
        return tpu_vm.render(asked("v5p:4x4x4", arguments), zone="z", project="p", setup="s")

    names = [
        re.search("\nname=([^ ]+) ", script(workdir))[1] for workdir in ("/a/griffin", "/a/griffin/", "/b/griffin")
    ]
    assert names[0] == names[1] != names[2]
    assert all(name.startswith("griffin-") and f"--node-id={name} " not in script("/c/griffin") for name in names)


WAIT = "for _ in {1..3000}; do sleep 0.02;"  # not for ever, should a test fail


class Host:
    """Where the script for TPU VMs tells each host to train, with a stand-in for python: each start says so in ``starts``
    and does what ``program`` says."""

    def __init__(self, home, *program):
        (home / "jaxlinear").mkdir()
        self._home, self.starts, self.log = home, home / "starts", home / "griffin-96db98.log"
        stand_in(home / "python", f"echo start | tee -a {self.starts}", f"cd {home}", *program)
        script = CASES["tpu_vm.sh"]().partition("\nqueued()")[0]
        printed = subprocess.run(["bash", "-c", f"{script}\ntrain"], capture_output=True, text=True, check=True)
        self._command = printed.stdout

    def connect(self):
        """As sshd does: the command in a session of its own."""
        environment = {"PATH": f"{self._home}:/bin:/usr/bin", "HOME": str(self._home)}
        return subprocess.Popen(
            ["bash", "-c", self._command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, text):
        begin = time.monotonic()
        while not self.log.exists() or text not in self.log.read_text():
            assert time.monotonic() - begin < 60
            time.sleep(0.02)


@pytest.mark.parametrize("end, status", [(0, 0), (2, 2), (1, 101), (134, 134)])
def test_a_run_outlives_its_connection(tmp_path, end, status):
    """And the next one follows it: no other is started, and its status is the run's."""
    host = Host(tmp_path, f"{WAIT} [ -e go ] && break; done", "echo done", f"exit {end}")
    lost = host.connect()
    host.wait_for("start")
    os.killpg(lost.pid, signal.SIGHUP)
    lost.communicate(timeout=60)
    assert lost.returncode == -signal.SIGHUP
    follows = host.connect()
    assert follows.stdout.readline() == "start\n"
    (tmp_path / "go").touch()
    said, _ = follows.communicate(timeout=60)
    assert (follows.returncode, said) == (status, "done\n")
    assert host.starts.read_text() == "start\n"
    again = host.connect()
    said, _ = again.communicate(timeout=60)
    assert again.returncode == status and host.starts.read_text() == "start\n" * 2


def test_a_machine_that_is_taken_away_tells_its_run(tmp_path):
    """By SIGTERM and SIGHUP at once, to all that a connection began."""
    host = Host(tmp_path, "trap 'echo saved; exit 75' TERM", "echo ready", f"{WAIT} :; done")
    taken = host.connect()
    host.wait_for("ready")
    os.killpg(taken.pid, signal.SIGTERM)
    os.killpg(taken.pid, signal.SIGHUP)
    taken.communicate(timeout=60)
    host.wait_for("saved")
    begin = time.monotonic()
    while not (tmp_path / "griffin-96db98.status").exists():
        assert time.monotonic() - begin < 60
        time.sleep(0.02)
    assert (tmp_path / "griffin-96db98.status").read_text() == "75\n" and host.starts.read_text() == "start\n"


def test_a_run_that_saved_itself_goes_on_in_its_place(tmp_path):
    host = Host(tmp_path, f"[ $(wc -l < {tmp_path}/starts) -lt 3 ] && exit 75", "exit 0")
    run = host.connect()
    said, _ = run.communicate(timeout=60)
    assert (run.returncode, said) == (0, "start\n" * 3)


@pytest.mark.parametrize(
    "target, shape", [("v5p:2x2x16", "v5p --topology=2x2x16"), ("v5e:4x8", "v5litepod --topology=4x8")]
)
def test_a_slice_is_asked_for_by_its_shape(target, shape):
    assert f" --type={shape} " in tpu_vm.render(asked(target), zone="z", project="p", setup="s")


def test_a_manifest_starts_one_pod_a_host():
    manifest = yaml.safe_load(CASES["gke_tpu.yaml"]())
    (hosts,) = manifest["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 8
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"][-1].endswith("--expect=tpu:32")


def of_gke(request=None, image="i", mounts=("runs:/shared",), **options):
    return gke.render(request or asked("h100:8"), image=image, mounts=mounts, **options)


@pytest.mark.parametrize("options, seconds", [({}, 300), ({"spot": True}, 15), ({"spot": True, "grace": 120}, 120)])
def test_a_spot_node_gives_less_time(options, seconds):
    (hosts,) = yaml.safe_load(of_gke(**options))["spec"]["replicatedJobs"]
    assert hosts["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == seconds


@pytest.mark.parametrize(
    "status, action",
    [(2, "FailJobSet"), (22, "RestartJobSet"), (75, "RestartJobSetAndIgnoreMaxRestarts"), (134, "RestartJobSet")],
)
def test_what_a_set_does_after_a_status(status, action):
    """By the rules of Jobs and JobSets: the first that matches, and of a JobSet counted restarts if none does."""
    spec = yaml.safe_load(of_gke())["spec"]
    codes = [
        rule.get("onExitCodes", {"values": []})["values"]
        for rule in spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    ]
    matched = [i for i, values in enumerate(codes) if status in values]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    if matched:
        reason = "PodFailurePolicy"
        message = (
            f"Container train for pod a/b failed with exit code {status} matching FailJob rule at index {matched[0]}"
        )
    actions = [
        rule["action"]
        for rule in spec["failurePolicy"]["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(re.fullmatch(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [".*"]))
    ]
    assert [*actions, "RestartJobSet"][0] == action


def test_a_set_waits_in_a_queue():
    assert yaml.safe_load(of_gke(queue="tpus"))["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    assert "labels" not in yaml.safe_load(of_gke())["metadata"]


def test_the_status_of_a_preempted_run_is_that_of_the_loop():
    assert request.PREEMPTED == PREEMPTED


@pytest.mark.parametrize(
    "make, message",
    [
        *(
            (lambda target=target: asked(target), f"there is no target '{target}'")
            for target in ("v9:2", "v5e:0x4", "v5e:4x04", "v5p:4x4", "v5e:2x2x2", "v6e:8", "h100:0", "h100:2x2")
        ),
        (lambda: asked("h100:12"), "h100:12: more than 8 devices are whole hosts of as many"),
        (lambda: asked("v5e:3x8"), "there is no slice v5e:3x8; those of v5e are 1x1, .*, of which 4x4 is the nearest"),
        (lambda: asked("v6e:32x32"), "there is no slice v6e:32x32; .*, of which 16x16 is the nearest"),
        (
            lambda: request.check_flags([*ARGUMENTS, "--workdri=x"]),
            "^'--workdri=x' is none of .*; did you mean --workdir=",
        ),
        (
            lambda: request.check_flags(["--config=x.py", "run"]),
            "^'run' is none of the options of launch/train.py that",
        ),
        (lambda: asked("h100:8", ["--config=x.py"]), "the training command has no --workdir"),
        (lambda: asked("h100:8", name="No Name"), "--name='No Name' is no name for a job"),
        (
            lambda: slurm.render(asked("v5e:2x4")),
            "SLURM runs on GPUs here, not on v5e:2x4; --platform=tpu_vm, gke or local may",
        ),
        (lambda: slurm.render(asked("cpu:2")), "SLURM runs on GPUs here, not on cpu:2"),
        (
            lambda: slurm.render(asked("h100:8"), minutes=5, grace=300),
            "--grace=300: with --minutes=5 the run would be told to end whenever it begins; --grace must be less than 300",
        ),
        (
            lambda: slurm.render(asked("h100:8"), options={"no-requeue": None}),
            "--sbatch=no-requeue: a run that was preempted goes back",
        ),
        (lambda: slurm.render(asked("h100:8"), options={"N": "2"}), "--sbatch=N: options are known here by their long"),
        *(
            (
                lambda value=value: slurm.render(asked("h100:8"), options={"comment": value}),
                r"#SBATCH --comment: .* has a line break or a double quote; sbatch takes it without",
            )
            for value in ("a\nb", 'say "a"')
        ),
        (lambda: of_gke(asked("cpu:2")), "GKE needs to know which nodes: v5e, .*, not cpu:2"),
        (lambda: of_gke(asked("gpu:8")), "GKE needs to know which nodes: .*, not gpu:8"),
        (
            lambda: of_gke(spot=True, grace=300),
            "--grace=300: spot nodes are gone 15 seconds after SIGTERM, .*; with --spot --grace is at most 120",
        ),
        (lambda: of_gke(image=""), "--platform=gke needs --image"),
        (
            lambda: of_gke(mounts=[]),
            "--workdir=/shared/runs/griffin would .* goes with the pod .*; give one below /PATH",
        ),
        (lambda: of_gke(mounts=["a:/data", "b:/shared/run"]), "--workdir=.*; give one below /data or /shared/run$"),
        (
            lambda: of_gke(asked("h100:8", ["--config=c", "--workdir=/shared/../runs"])),
            r"--workdir=/shared/\.\./runs would lie on a pod's own disk",
        ),
        (lambda: of_gke(mounts=["gs://a/b:/shared"]), "--mount='gs://a/b:/shared' is neither gs://BUCKET:/PATH nor"),
        (lambda: of_gke(mounts=["/shared"]), "--mount='/shared' is neither"),
        (lambda: tpu_vm.render(asked("h100:8"), zone="z", project="p", setup="s"), "--platform=tpu_vm is for TPUs"),
        (
            lambda: tpu_vm.render(asked("v5e:2x4"), zone="z", project=None, setup="s"),
            "--platform=tpu_vm needs --project",
        ),
        (lambda: local.run(asked("cpu:3"), processes=2), "--processes=2 does not divide 3 devices"),
        (
            lambda: local.run(dataclasses.replace(asked("cpu:1"), python="/no/python"), processes=1),
            "--python=/no/python: this machine has no such program; by default it is ",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_name_is_the_work_directorys():
    assert asked("h100:8", [*ARGUMENTS[:1], "--workdir=/runs/Griffin_100M.b/"]).name == "griffin-100m-b"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            "--platform=local --target=cpu:1 --output=x",
            "--output is for --platform=slurm or gke or tpu_vm; local has no use",
        ),
        (
            "--platform=local --target=cpu:1 --submit",
            "--submit is for --platform=slurm or gke; local has no use for it",
        ),
        ("--platform=slurm --target=h100:8 --spot", "--spot is for --platform=gke or tpu_vm; slurm has no use for it"),
        ("--platform=slurm --target=h100:8 --requeue", "--requeue is for --platform=local; slurm has no use for it"),
        (
            "--platform=gke --target=h100:8 --image=i --minutes=9",
            "--minutes is for --platform=slurm; gke has no use for it",
        ),
        (
            "--platform=tpu_vm --target=v5e:2x4 --grace=9",
            "--grace is for --platform=slurm or gke; tpu_vm has no use for it",
        ),
        ("--platform=tpu_vm --target=v5e:2x4 --shell=x", "--shell is for --platform=slurm; tpu_vm has no use for it"),
        ("--platform=slurm --target=h100:8 --output=no/x", "--output=no/x: its directory does not exist"),
    ],
)
def test_submit_refuses_what_it_would_not_read(options, message):
    arguments = ["--config=configs/griffin_100m.py", "--workdir=x"]
    command = [sys.executable, "launch/submit.py", *options.split(), "--", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"submit.py: {message}") and done.stderr.count("\n") == 1
