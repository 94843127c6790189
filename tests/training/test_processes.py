"""launch/train.py as several processes on one machine, joined by ``jax.distributed``."""

import contextlib
import dataclasses
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import jaxlinear
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.errors import UserError
from jaxlinear.launching.local import held_port
from jaxlinear.parallel import distributed
from jaxlinear.training.metrics import read
from tests.training import tiny

pytestmark = pytest.mark.slow

STEPS = 20  # of tiny.ARGUMENTS
# Seconds within which the other processes end when one is lost during training: less than the 100 for which JAX waits for a
# sign of life, which is how long it takes when one is lost while all write a checkpoint. The time that a run takes to begin
# is added: 10 s, and more on a slow machine, where ending takes longer too.
PROMPT = 60


@dataclasses.dataclass
class Process:
    running: subprocess.Popen
    output: pathlib.Path

    def end(self):
        """``(status, the lines on stderr of the program)``."""
        status = self.running.wait(timeout=tiny.PATIENCE)
        return status, [line for line in str(self).splitlines() if line.startswith("train.py: ")]

    def __str__(self):
        return self.output.read_text()


@pytest.fixture
def processes(tiny_dataset, tmp_path):
    """``processes(workdir, count, devices, *arguments, each=...)`` starts ``count`` of them, each with ``devices`` devices
    and its own further arguments; ``before`` is Python code that the last one runs first. None outlives the test, however
    it ends."""
    with contextlib.ExitStack() as stack:

        def run(workdir, count, devices, *arguments, each=None, folders=None, before=""):
            port = stack.enter_context(held_port())
            joined = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}"]
            environment = tiny.environment()
            environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
            started = []
            for i in range(count):
                own = [*joined, f"--process={i}", *arguments, *(each[i] if each else [])]
                output = tmp_path / f"{time.monotonic_ns()}_{i}"
                with output.open("w") as file:
                    process = subprocess.Popen(
                        tiny.command(workdir, tiny_dataset, *own, before=before if i == count - 1 else ""),
                        cwd=folders[i] if folders else tiny.REPOSITORY,
                        env=environment,
                        stdout=file,
                        stderr=file,
                    )
                stack.callback(process.wait)
                stack.callback(process.kill)
                started.append(Process(process, output))
            return started

        yield run


def wait_for(group, condition):
    return tiny.wait_for([process.running for process in group], condition)


# A host whose list of checkpoints is out of date: three times, it lacks the newest.
STALE = """
import orbax.checkpoint as ocp
listed, looks = ocp.CheckpointManager._load_checkpoint_infos, []
def stale(self, *args, **options):
    looks.append(1)
    found = listed(self, *args, **options)
    return found[:-1] if len(looks) <= 3 else found
ocp.CheckpointManager._load_checkpoint_infos = stale
"""


def test_a_run_goes_on_with_other_processes_and_another_mesh(processes, uninterrupted, tmp_path):
    """Two processes of 2 devices, which continue until one is killed; four of one device, told to stop; one alone. The
    curve is always the same."""
    workdir = tmp_path / "run"
    endless = "--config.training.steps=100000"
    rarely = "--config.checkpoint.every_steps=1000"  # so that none is under way when a process is killed
    spread = ("--config.mesh.data=2", "--config.mesh.sequence=2", rarely)
    for process in processes(workdir, 2, 2, *spread, "--config.training.steps=8"):
        assert process.end()[0] == 0, process
    pair = processes(workdir, 2, 2, *spread, endless, before=STALE)
    began = wait_for(pair, lambda: tiny.last_step(workdir) >= 11)
    pair[1].running.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    status, _ = pair[0].end()
    assert status not in (0, 75) and time.monotonic() - begin < PROMPT + began, pair[0]
    assert Checkpoints(workdir).steps()[-1] == 8
    further = tiny.last_step(workdir) + 3  # beyond the killed pair's lines: the next processes cut those after step 8

    # So SIGTERM mostly ends an evaluation.
    often = ("--config.evaluation.every_steps=1", "--config.evaluation.batches=2")
    four = processes(workdir, 4, 1, "--config.mesh.sequence=4", rarely, endless, *often)
    wait_for(four, lambda: tiny.last_step(workdir) >= further)
    four[2].running.send_signal(signal.SIGTERM)
    for process in four:
        assert process.end()[0] == 75, process
    stopped = Checkpoints(workdir).steps()[-1]
    assert stopped >= further and stopped == max(map(int, tiny.losses(workdir)))

    (alone,) = processes(workdir, 1, 1, f"--config.training.steps={max(STEPS, stopped + 1)}", *often)
    assert alone.end()[0] == 0, alone
    evaluated = [line["step"] for line in read(workdir) if "heldout_loss" in line]
    # Also at step 8, where the four found no evaluation when they began, and at the step whose evaluation was ended.
    assert evaluated == list(range(8, max(STEPS, stopped + 1) + 1))
    losses, expected = tiny.losses(workdir), tiny.losses(uninterrupted)
    assert list(losses) == list(range(1, max(STEPS, stopped + 1) + 1))
    for step, loss in expected.items():
        assert float(losses[step]) == pytest.approx(float(loss), rel=1e-5), step


def test_the_coordinator_lost(processes, tmp_path):
    """The other processes learn about each other through process 0."""
    arguments = ("--config.mesh.data=1", "--config.mesh.sequence=2", "--config.training.steps=100000")
    pair = processes(tmp_path / "run", 2, 1, *arguments)
    began = wait_for(pair, lambda: tiny.last_step(tmp_path / "run") >= 2)
    pair[0].running.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    status, _ = pair[1].end()
    assert status not in (0, 75) and time.monotonic() - begin < PROMPT + began, pair[1]


# A host whose disk takes no file of the size of a checkpoint's; what it prints goes through a process without that limit.
NO_LARGE_FILES = """
import os, resource, subprocess
printer = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
os.dup2(printer.stdin.fileno(), 1)
os.dup2(printer.stdin.fileno(), 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
"""


def test_a_host_that_cannot_write_its_part_of_a_checkpoint_ends(processes, tmp_path):
    """At the next step, instead of waiting for the others, which wait for it."""
    workdir = tmp_path / "run"
    endless = ("--config.training.steps=100000", "--config.checkpoint.every_steps=4")
    pair = processes(workdir, 2, 2, "--config.mesh.fsdp=4", *endless, before=NO_LARGE_FILES)
    wait_for(pair[:1], lambda: tiny.last_step(workdir) >= 4)
    begin = time.monotonic()
    status, (line,) = pair[1].end()
    assert status == 2 and time.monotonic() - begin < PROMPT, pair[1]
    assert line.startswith("train.py: a file would be larger than the file system or the limit"), pair[1]
    assert "Traceback" not in str(pair[1]), pair[1]
    assert Checkpoints(workdir).steps() == []


DIFFERS, ITS_OWN = (
    "of process 1 differs from that of process 0; all must be given the same",
    "process 1 failed; its own ",
)
FAILING = """
import errno
from jaxlinear.data import blocks
def refused(*_):
    raise OSError(errno.NAME, "x", "some/shard")
blocks._content = refused
"""
# What two hosts are started with, their status, and what they say: the second's own line where it is another one.
REFUSED = {
    "configs": ({"each": [[], ["--config.training.seed=1"]]}, 2, f"the config {DIFFERS}"),
    # An activation differs in the last process's version of the code; nothing else would reveal it.
    "code": (
        {"before": "import jaxlinear; jaxlinear.__version__ = '0.0.9'\nimport jax; jax.nn.silu = jax.nn.gelu"},
        2,
        *(
            f"the program {DIFFERS}, with the same versions on every host; here it is jaxlinear {version} (code "
            for version in (jaxlinear.__version__, "0.0.9")
        ),
    ),
    "devices": (
        {
            "each": [["--expect=cpu:4"]] * 2,
            "before": "import os; os.environ['XLA_FLAGS'] += ' --xla_force_host_platform_device_count=2'",
        },
        1,
        "4 cpu devices are expected in total, but process 0 sees 1 cpu; process 1 sees 2 cpu",
    ),
    "data": ({}, 2, f"the data {DIFFERS}"),
    "directories": (  # the same relative path, as on two hosts with their own disks
        {},
        2,
        "the work directory run of process 1 is not that of process 0, which wrote a file there; all processes of a run "
        "must share one directory, on a network file system or in a bucket that all hosts mount",
    ),
    "no data": ({}, 2, ITS_OWN, "no dataset at data: the directory does not exist"),
    # All end with the status of the one whose machine fails, instead of waiting for it until JAX ends them.
    "EACCES": ({"before": FAILING.replace("NAME", "EACCES")}, 2, ITS_OWN, "permission denied: some/shard"),
    "ESTALE": (
        {"before": FAILING.replace("NAME", "ESTALE")},
        1,
        ITS_OWN,
        "a file server no longer knows a file that was open (stale file handle): some/shard",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hosts_that_do_not_fit_are_refused(processes, tiny_dataset, tmp_path, case):
    """All say so in a line each, and nothing is written. Each starts in a folder of its own."""
    options, status, *said = REFUSED[case]
    first, second = folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "data").symlink_to(tiny_dataset)
    if case in ("data", "no data"):
        (second / "data").unlink()
    if case == "data":
        tiny.copy_of(tiny_dataset, second / "data", seed=1)
    workdir = "run" if case == "directories" else tmp_path / "run"
    arguments = (f"--config={tiny.REPOSITORY / tiny.ARGUMENTS['config']}", "--config.data.path=data")
    pair = processes(workdir, 2, 1, *arguments, folders=folders, **options)
    for process, line in zip(pair, [*said, *said], strict=False):
        ended, (found,) = process.end()
        assert ended == status and found.startswith(f"train.py: {line}"), process
    assert not (tmp_path / "run").exists() and not [*first.glob("run/*"), *second.glob("run/*")]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("localhost:1", 2, 2), "--process=2 is not one of the --processes=2, which are numbered from 0"),
        (("localhost:1", 2, -1), "--process=-1 is not one of the --processes=2"),
        ((None, 2, 0), "--coordinator, --processes and --process must be given together; --coordinator is missing"),
        (("localhost:1", 2, None), "must be given together; --process is missing"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        distributed.join(*flags)


ALONE = """
import logging, sys
from jaxlinear.parallel import distributed
logging.basicConfig(level=logging.INFO, format="%(message)s")
distributed.join("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]), patience=3)
"""


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_whose_others_do_not_come_ends_with_a_reason(process):
    with held_port() as port:  # nothing answers process 1 there
        command = [sys.executable, "-c", ALONE, str(port), str(process)]
        done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=tiny.PATIENCE)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"-c: the other processes (of 2) at 127.0.0.1:{port} did not connect within 0.05 minutes: were they started, and "
        "can process 0 be reached from all hosts?"
    )
    assert "stack trace" not in done.stderr


def test_while_a_process_waits_it_says_so(monkeypatch, caplog):
    monkeypatch.setattr(distributed, "_SAYS_SO_EVERY", 0.05)
    begin = time.monotonic()
    with caplog.at_level("INFO"), distributed._waiting("the others", patience=1800):
        while len(caplog.messages) < 2 and time.monotonic() - begin < 50:
            time.sleep(0.01)
    assert caplog.messages[:2] == ["waiting for the others, 0 of 30 minutes"] * 2


@pytest.fixture
def joins(monkeypatch):
    """``joins()``: whether a process joins others, where no scheduler is unless a test says so."""
    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "JOBSET_NAME", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **options: calls.append(options))
    return lambda: (distributed.join(), bool(calls))[1]


@pytest.mark.parametrize("hosts, expected", [({}, False), ({"TPU_WORKER_HOSTNAMES": "a,b"}, True)])
def test_of_a_jobset_only_pods_with_tpus_are_joined(joins, monkeypatch, hosts, expected):
    for name, value in {"JOBSET_NAME": "run", "JOB_COMPLETION_INDEX": "0", **hosts}.items():
        monkeypatch.setenv(name, value)
    assert joins() == expected


@pytest.mark.parametrize(
    "device, vendor, expected", [("accel0", "1ae0", True), ("vfio/3", "1ae0", True), ("vfio/3", "10de", False)]
)
def test_what_vfio_gives_to_programs_may_be_no_tpu(joins, monkeypatch, tmp_path, device, vendor, expected):
    for path, text in ((f"dev/{device}", ""), ("sys/bus/pci/devices/0000:00:05.0/vendor", f"0x{vendor}\n")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [str(path) for path in tmp_path.glob(pattern[1:])])
    monkeypatch.setattr(distributed, "_has", lambda package: True)
    assert joins() == expected


def test_alone_there_is_nothing_to_join(joins):
    assert not joins() and distributed.is_first()
    distributed.check_agreement("the config", "text")
    with pytest.raises(UserError, match="as it was"), distributed.together():
        raise UserError("as it was")
