"""What the schedulers are given, compared with golden files, which ``python -m tests.launching.rewrite`` rewrites."""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sysconfig

import pytest
import yaml

from jaxlinear.errors import UserError
from jaxlinear.exit_status import PREEMPTED
from jaxlinear.launching import gke, local, request, slurm, tpu_vm
from tests.launching.rewrite import ARGUMENTS, CASES, GOLDEN, asked
from tests.launching.shell import sent, stand_in


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    assert CASES[name]() == (GOLDEN / name).read_text(encoding="utf-8")


SCRIPTS = {name: make for name, make in CASES.items() if name.endswith(".sh")} | {
    f"{function} of a host": lambda function=function: sent(CASES["tpu_vm.sh"](), function)
    for function in ("setup", "train")
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_no_complaint(name):
    """Above all, the shell reads it."""
    places = [sysconfig.get_path("scripts"), os.environ["PATH"]]  # this environment's need not be on the PATH
    program = shutil.which("shellcheck", path=os.pathsep.join(places))
    assert program, "the extra test has it: pip install 'jaxlinear[test]'"
    for command in (["bash", "-n"], [program, "--norc", "--shell=bash", "-"]):
        found = subprocess.run(command, input=SCRIPTS[name](), text=True, capture_output=True, check=False)
        assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_sbatch_reads_values_whole():
    """sbatch follows a shell's rules: a blank ends a value, and # begins a comment."""
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
    """Two processes get them, and record what they see."""
    record = f'printf "$CUDA_VISIBLE_DEVICES" > {tmp_path}/"$last"'
    program = stand_in(tmp_path / "python", "for last; do :; done", record)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.run(dataclasses.replace(asked("gpu:4"), python=program), processes=2) == 0
    assert [(tmp_path / f"--process={i}").read_text() for i in range(2)] == dealt


@pytest.mark.parametrize(
    "ends, status, goes_on",
    [
        (("exit 75", "exit 0"), 75, True),
        (("exit 75", "exit 2"), 2, False),
        (("exit 1", "exit 75"), 1, False),
        (("kill -9 $$", "exit 75"), 137, False),
        (("exit 0", "exit 0"), 0, False),
    ],
)
def test_a_run_goes_on_if_none_of_its_processes_failed(tmp_path, monkeypatch, ends, status, goes_on):
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:  # enough: end it as a person would
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(local.time, "sleep", pause)
    log = tmp_path / "log"
    cases = (f"--process={i}) echo >> {log}; {end};;" for i, end in enumerate(ends))
    program = stand_in(tmp_path / "python", "for last; do :; done", 'case "$last" in', *cases, "esac")
    request = dataclasses.replace(asked("cpu:2"), python=program)
    assert local.run(request, processes=2, requeue=True) == status
    assert len(log.read_text().splitlines()) == 2 * len(pauses or [0])
    assert pauses == [local._PAUSE] * 2 * goes_on


def test_told_to_end_between_two_starts(tmp_path, monkeypatch):
    """Both processes are told to end: the first, which was not yet known, and the one that starts later."""
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


def test_the_port_of_a_run_is_no_one_elses():
    """It is held from before its processes start. A process that asks for it, as process 0 does, may listen on it."""
    with local.held_port() as port, socket.socket() as other, socket.socket() as shares:
        with pytest.raises(OSError, match="Address already in use"):
            other.bind(("127.0.0.1", port))
        shares.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shares.bind(("127.0.0.1", port))
        shares.listen()
        socket.create_connection(("127.0.0.1", port)).close()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))


@pytest.mark.parametrize("visible, count", [("0,1,2", 3), ("", 0)])
def test_fewer_gpus_than_asked_for(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(UserError, match=f"^CUDA_VISIBLE_DEVICES={visible} names {count} GPUs, .*gpu:4 asks for 4;"):
        local.run(asked("gpu:4"), processes=2)


def of_slurm(tmp_path, statuses, refused=0, script="slurm.sh"):
    """Runs the script once for each of these statuses of srun, with stand-ins for SLURM's commands; the first ``refused``
    calls of scontrol fail. Returns the last exit status, what the stand-ins logged, and stderr."""
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
        given = {"input": script, "env": environment, "cwd": tmp_path}
        found = subprocess.run(["bash"], **given, text=True, capture_output=True, check=False)
    return found.returncode, log.read_text(), found.stderr


ENDED = "the run failed with status 1, after 20 restarts (griffin-17.failures); sbatch this script to resume it"


@pytest.mark.parametrize(
    "statuses, said, error",
    [
        ([PREEMPTED], "requeue 17\n", ""),
        ([0], "", ""),
        ([2], "", ""),
        ([1], "requeue 17\n", ""),
        ([134] * 20, "requeue 17\n", ""),
        ([134] * 20 + [PREEMPTED] * 30, "requeue 17\n", ""),
        ([134] * 20 + [0] + [134], "requeue 17\n", ""),
        ([134, PREEMPTED] * 20 + [1], "", ENDED),  # preemptions between its failures do not count
    ],
)
def test_a_job_goes_back_into_the_queue_by_its_status(tmp_path, statuses, said, error):
    *found, errors = of_slurm(tmp_path, statuses)
    assert found == [statuses[-1], said] and errors.startswith(error) and bool(errors) == bool(error)


@pytest.mark.parametrize("status", [PREEMPTED, 134])
def test_a_controller_that_is_away_for_a_while(tmp_path, status):
    ended, said, _ = of_slurm(tmp_path, [status], refused=2)
    assert (ended, said.split("\n")) == (status, ["requeue 17", "sleep15", "requeue 17", "sleep30", "requeue 17", ""])
    ended, said, errors = of_slurm(tmp_path, [status], refused=99)
    assert (ended, said.count("requeue")) == (status, 6)
    assert errors.endswith("SLURM did not take the job back into the queue; sbatch this script to resume it\n")


def test_cpus_of_a_process(tmp_path):
    """srun does not know what sbatch was told; if sbatch was told nothing, the processes share the node's CPUs."""
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
    """The run has whole nodes to itself, and the user's options replace the defaults."""
    script = slurm.render(asked(target), options=options)
    read = [line.removeprefix("#SBATCH --") for line in script.split("\n") if line.startswith("#SBATCH ")]
    names = [line.partition("=")[0] for line in read]
    assert len(set(names)) == len(names) and read.count("requeue") == 1
    assert [line for line in read if line.startswith(("exclusive", "mem", "oversubscribe"))] == sorted(
        lines, key=read.index
    )


def of_gke(request=None, image="i", mounts=("runs:/shared",), **options):
    return gke.render(request or asked("h100:8"), image=image, mounts=mounts, **options)


def read(manifest):
    """The set, the jobs of each of its slices, and their pods."""
    spec = yaml.safe_load(manifest)["spec"]
    (hosts,) = spec["replicatedJobs"]
    job = hosts["template"]["spec"]
    return {**spec, "replicas": hosts["replicas"]}, job, job["template"]["spec"]


@pytest.mark.parametrize(
    "target, slices, hosts, devices, kind",
    [
        ("v5e:4x8", 1, 8, 32, "tpu-v5-lite-podslice"),
        ("2xv6e:4x8", 2, 8, 64, "tpu-v6e-slice"),
        ("tpu7x:4x4x4", 1, 16, 128, "tpu7x"),
    ],
)
def test_a_manifest_starts_one_pod_a_host(target, slices, hosts, devices, kind):
    """Slices are as many jobs of a set. GKE counts chips, and JAX devices, of which a chip may be two."""
    jobs, job, pod = read(of_gke(asked(target)))
    (container,) = pod["containers"]
    assert jobs["replicas"] == slices and job["completions"] == job["parallelism"] == hosts
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"][-1].endswith(f"--expect=tpu:{devices}")
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == kind


def test_a_dollar_is_none_of_kubernetes():
    """Kubernetes expands ``$(NAME)`` in a command, and turns ``$$`` into ``$``, before bash sees it."""
    text = "--config.data.path=/data/$(HOSTNAME) $$a"
    *_, pod = read(of_gke(asked("h100:16", [ARGUMENTS[0], "--workdir=/shared/a", text])))
    line = pod["containers"][0]["command"][-1]
    seen = re.sub(r"\$\$|\$\(\w+\)", lambda found: "$" if found[0] == "$$" else "a-pod", line)
    assert text in shlex.split(seen) and seen.endswith('--process="$JOB_COMPLETION_INDEX"')


@pytest.mark.parametrize("options, seconds", [({}, 300), ({"spot": True}, 15), ({"spot": True, "grace": 120}, 120)])
def test_a_spot_node_gives_less_time(options, seconds):
    *_, pod = read(of_gke(**options))
    assert pod["terminationGracePeriodSeconds"] == seconds


@pytest.mark.parametrize(
    "status, action",
    [(2, "FailJobSet"), (22, "RestartJobSet"), (75, "RestartJobSetAndIgnoreMaxRestarts"), (134, "RestartJobSet")],
)
def test_what_a_set_does_after_a_status(status, action):
    """Jobs and JobSets apply the first rule that matches; if none does, a JobSet makes a counted restart."""
    jobs, job, _ = read(of_gke())
    codes = [rule.get("onExitCodes", {"values": []})["values"] for rule in job["podFailurePolicy"]["rules"]]
    matched = [i for i, values in enumerate(codes) if status in values]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    if matched:
        rule = f"matching FailJob rule at index {matched[0]}"
        reason, message = "PodFailurePolicy", f"Container train for pod a/b failed with exit code {status} {rule}"
    actions = [
        rule["action"]
        for rule in jobs["failurePolicy"]["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(re.fullmatch(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [".*"]))
    ]
    assert [*actions, "RestartJobSet"][0] == action


def of_slurm_with(target="h100:8", **options):
    return slurm.render(asked(target), **options)


def of_tpu_vm(target="v5e:2x4", project="p"):
    return tpu_vm.render(asked(target), zone="z", project=project, setup="s")


NO_PYTHON = dataclasses.replace(asked("cpu:1"), python="/no/python")
REFUSALS = [
    *(
        (lambda target=target: asked(target), f"there is no target '{target}'")
        for target in ("v9:2", "v5e:0x4", "v5e:4x04", "v5p:4x4", "v5e:2x2x2", "v6e:8", "h100:0", "h100:2x2")
    ),
    (lambda: asked("h100:12"), "h100:12: more than 8 devices must fill whole hosts"),
    (lambda: asked("v5e:3x8"), "there is no slice v5e:3x8; the slices of v5e are 1x1, .*, and the nearest is 4x4"),
    (lambda: asked("v6e:32x32"), "there is no slice v6e:32x32; .*, and the nearest is 16x16"),
    (lambda: asked("2xv5e:3x8"), "there is no slice v5e:3x8; .*, and the nearest is 4x4"),
    (lambda: asked("2xh100:8"), "2xh100:8: only TPU slices can be multiplied"),
    (lambda: request.check_flags([*ARGUMENTS, "--workdri=x"]), "^'--workdri=x' is .*; did you mean --workdir="),
    (lambda: request.check_flags(["--config=x.py", "run"]), "^'run' is not one of the options"),
    (lambda: asked("h100:8", ["--config=x.py"]), r"the training command \(after --\) needs --workdir"),
    (lambda: asked("h100:8", name="No Name"), "--name='No Name' is not a job name"),
    (lambda: of_slurm_with("v5e:2x4"), "not on v5e:2x4; try --platform=tpu_vm, gke or local"),
    (lambda: of_slurm_with("cpu:2"), "SLURM runs on GPUs here, not on cpu:2"),
    (lambda: of_slurm_with(minutes=5, grace=300), "--grace=300: with --minutes=5 .* must be less than 300"),
    (lambda: of_slurm_with(options={"no-requeue": None}), "--sbatch=no-requeue: a preempted run must go back"),
    (lambda: of_slurm_with(options={"N": "2"}), "--sbatch=N: give the option by its long"),
    (lambda: slurm.named(["qos=a", "--exclusive", "--qos=b"]), "--sbatch=--qos=b: qos is given twice"),
    *(
        (lambda value=value: of_slurm_with(options={"comment": value}), "--comment: .* a line break or a double quote")
        for value in ("a\nb", 'say "a"')
    ),
    *(
        (lambda target=target: of_gke(asked(target)), f"a target with known nodes, one of v5e, .*, not {target}")
        for target in ("cpu:2", "gpu:8")
    ),
    (lambda: of_gke(asked("2xv5e:2x2")), "2xv5e:2x2: GKE joins only slices of several hosts"),
    (lambda: of_gke(spot=True, grace=300), "--grace=300: spot nodes .*; with --spot, --grace must be at most 120"),
    (lambda: of_gke(image=""), "--platform=gke needs --image"),
    (lambda: of_gke(mounts=[]), "--workdir=/shared/runs/griffin would .* lost with the pod .*; give one below /PATH"),
    (lambda: of_gke(mounts=["a:/data", "b:/shared/run"]), "--workdir=.*; give one below /data or /shared/run$"),
    (lambda: of_gke(asked("h100:8", ["--config=c", "--workdir=/shared/../r"])), r"/shared/\.\./r would be on a pod's"),
    (lambda: of_gke(mounts=["gs://a/b:/shared"]), "--mount='gs://a/b:/shared' must be gs://BUCKET:/PATH or"),
    (lambda: of_gke(mounts=["/shared"]), "--mount='/shared' must be"),
    (lambda: of_gke(mounts=["gs://a:/data", "b:/shared", "gs://c:/data/"]), "--mount is given twice at /data;"),
    (lambda: of_gke(mounts=["b:/shared", "gs://a:/dev/shm/"]), "--mount at /dev/shm: NCCL's"),
    (lambda: of_tpu_vm("tpu7x:2x2x2"), "has v5e, v5p, v6e, not tpu7x:2x2x2; --platform=gke has it"),
    (lambda: of_tpu_vm("2xv5e:4x4"), "one slice, not 2xv5e:4x4; --platform=gke joins several"),
    (lambda: of_tpu_vm("h100:8"), "--platform=tpu_vm is for TPUs"),
    (lambda: of_tpu_vm(project=None), "--platform=tpu_vm needs --project"),
    (lambda: local.run(asked("cpu:3"), processes=2), "--processes=2 does not divide 3 devices"),
    (lambda: local.run(NO_PYTHON, processes=1), "--python=/no/python: this machine has no such program; the default"),
]


@pytest.mark.parametrize("make, message", REFUSALS)
def test_refusals(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_another_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no launch/train.py in {tmp_path}; run this in the folder of the"):
        local.run(asked("cpu:1"), processes=1)


def test_the_name_is_the_work_directorys():
    assert asked("h100:8", [*ARGUMENTS[:1], "--workdir=/runs/Griffin_100M.b/"]).name == "griffin-100m-b"


@pytest.mark.parametrize(
    "options, message",
    [
        ("local --target=cpu:1 --output=x", "--output is for --platform=slurm or gke or tpu_vm; local does not use"),
        ("local --target=cpu:1 --submit", "--submit is for --platform=slurm or gke; local does not use it"),
        ("slurm --target=h100:8 --spot", "--spot is for --platform=gke or tpu_vm; slurm does not use it"),
        ("slurm --target=h100:8 --requeue", "--requeue is for --platform=local; slurm does not use it"),
        ("gke --target=h100:8 --image=i --minutes=9", "--minutes is for --platform=slurm; gke does not use it"),
        ("tpu_vm --target=v5e:2x4 --grace=9", "--grace is for --platform=slurm or gke; tpu_vm does not use it"),
        ("tpu_vm --target=v5e:2x4 --shell=x", "--shell is for --platform=slurm; tpu_vm does not use it"),
        ("slurm --target=h100:8 --output=no/x", "--output=no/x: its directory does not exist"),
        ("slurm --target=h100:8 --python=~/bin/python", "--python=~/bin/python: a shell does not expand ~ after"),
    ],
)
def test_submit_refuses_what_it_would_not_read(start, options, message):
    arguments = ["--config=configs/griffin_100m.py", "--workdir=x"]
    done = start("submit", *f"--platform={options}".split(), "--", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"submit.py: {message}") and done.stderr.count("\n") == 1
