"""The script for TPU VMs: its shell runs here with stand-ins for gcloud and python."""

import os
import re
import signal
import subprocess
import time

import pytest

from jaxlinear.exit_status import PREEMPTED
from jaxlinear.launching import tpu_vm
from tests.launching.rewrite import ARGUMENTS, CASES, asked
from tests.launching.shell import sent, stand_in

GONE, NO_NETWORK = "!NOT_FOUND: Resource 'griffin' was not found", "!Could not reach the server"
PATIENCE = 240
PAID = (
    "griffin-96db98: a slice that is still there is paid for; this deletes it: gcloud compute tpus queued-resources "
    "delete griffin-96db98 --zone=us-east5-a --project=mine --force"
)


def of_tpu_vm(tmp_path, states, ends, create=(), delete=(), **options):
    """Runs the script for TPU VMs here, with a stand-in for gcloud that goes through these states and these exit statuses
    of ssh, create and delete (0 when there are no more). Returns its status, what it did, and what it said."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
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
    given = {"input": f"echo $$ > {tmp_path}/script\n{script}", "env": {"PATH": f"{tmp_path}:/bin:/usr/bin"}}
    found = subprocess.run(["bash"], **given, text=True, capture_output=True, timeout=PATIENCE)
    return found.returncode, log.read_text().split(), [line for line in found.stderr.split("\n") if line]


GONE_AGAIN = ["ACTIVE", "SUSPENDING", "SUSPENDED", GONE, "ACTIVE"]


@pytest.mark.parametrize(
    "states, ends, status, done",
    [
        (["ACTIVE"], [0, 0], 0, "ssh ssh"),
        ([GONE, "PROVISIONING", "ACTIVE"], [0, 0], 0, "create sleep30 sleep30 ssh ssh"),
        ([NO_NETWORK, "ACTIVE"], [0, 0], 0, "sleep60 ssh ssh"),
        (["ACTIVE"], [0, 2], 2, "ssh ssh"),
        (["ACTIVE", NO_NETWORK, "ACTIVE"], [0, 255, 0, 0], 0, "ssh ssh sleep60 sleep60 ssh ssh"),
        (GONE_AGAIN, [0, 255, 0, 0], 0, "ssh ssh sleep60 sleep30 delete sleep30 create sleep30 ssh ssh"),
        # The connection is lost while the slice is there, or a host saves its run and is not taken away.
        *((["ACTIVE"] * 2, [0, end, 0, 0], 0, "ssh ssh sleep60 ssh ssh") for end in (255, 1, PREEMPTED)),
        # When a slice is taken away, the rest of its run crashes.
        (GONE_AGAIN, [0, 134, 0, 0], 0, "ssh ssh sleep60 delete sleep30 create sleep30 ssh ssh"),
    ],
)
def test_a_slice_is_asked_for_again(tmp_path, states, ends, status, done):
    ended, did, errors = of_tpu_vm(tmp_path, states, ends)
    assert (ended, did) == (status, done.split())
    unknown = "griffin-96db98: gcloud could not find out the state of the slice (1 in a row, at most 20)"
    assert errors == [*[NO_NETWORK[1:], unknown] * (NO_NETWORK in states), PAID]


def test_a_state_that_is_never_known_is_the_end(tmp_path):
    """For example, gcloud's login has expired. Network failures that recover in between do not count, however many."""
    ended, did, errors = of_tpu_vm(tmp_path, [NO_NETWORK] * 3, [], restarts=2)
    assert (ended, did) == (1, ["sleep60", "sleep120"])
    unknown = "griffin-96db98: gcloud could not find out the state of the slice (3 in a row, at most 2)"
    assert errors[-2:] == [unknown, PAID]
    states = [*[NO_NETWORK, NO_NETWORK, "PROVISIONING"] * 3, "ACTIVE"]
    ended, did, _ = of_tpu_vm(tmp_path, states, [0, 0], restarts=2)
    assert (ended, did) == (0, [*["sleep60", "sleep120", "sleep30"] * 3, "ssh", "ssh"])


def test_a_run_that_fails_is_started_again(tmp_path):
    """Only a limited number of times; in between, connections may be lost any number of times."""
    ended, did, errors = of_tpu_vm(tmp_path, ["ACTIVE"] * 6, [0, 134, 0, 255, 0, 101, 0, 0], restarts=2)
    assert (ended, did) == (0, ["ssh", "ssh", *["sleep60", "ssh", "ssh"] * 3])
    assert errors[0] == "griffin-96db98: the run failed with status 134 (1 times, at most 2)"
    ended, did, errors = of_tpu_vm(tmp_path, ["ACTIVE"] * 6, [0, 134] * 3, restarts=2)
    assert ended == 134
    assert errors[-2:] == ["griffin-96db98: the run failed with status 134 (3 times, at most 2)", PAID]


@pytest.mark.parametrize(
    "states, ends, create, delete, did, said",
    [
        ([GONE], [], [1] * 3, [], "create sleep60 sleep30 create sleep120 sleep30 create", "the slice was refused"),
        (["SUSPENDED"], [], [], [1] * 3, "delete sleep60 sleep30 delete sleep120 sleep30 delete", "it could not be"),
        (
            *(["FAILED", GONE, "FAILED", GONE, "FAILED"], [], [], []),
            "delete sleep60 sleep30 create sleep30 delete sleep120 sleep30 create sleep30 delete",
            "the request for the slice failed",
        ),
        (["ACTIVE"], [255] * 3, [], [], "ssh sleep60 ssh sleep120 ssh", "the hosts could not be set up"),
    ],
)
def test_what_google_refuses_is_asked_for_again(tmp_path, states, ends, create, delete, did, said):
    """With pauses; if it is granted at last, the run begins, and otherwise the script ends."""
    states = states * 3 if len(states) == 1 else states
    ended, done, errors = of_tpu_vm(tmp_path, states, ends, create, delete, restarts=2)
    assert (ended, done) == (1, did.split())
    assert errors[-2].startswith(f"griffin-96db98: {said}") and errors[-2].endswith(" (3 in a row, at most 2)")
    assert errors[-1] == PAID
    ended, done, errors = of_tpu_vm(tmp_path, [*states, "ACTIVE"], [*ends, 0, 0], create, delete, restarts=3)
    assert (ended, done[-2:]) == (0, ["ssh", "ssh"])


def test_the_slice_of_a_finished_run_may_be_deleted(tmp_path):
    ended, did, errors = of_tpu_vm(tmp_path, ["ACTIVE"], [0, 0], delete=[1, 0], delete_when_done=True)
    assert (ended, did) == (0, ["ssh", "ssh", "delete", "sleep60", "delete"])
    assert errors == ["griffin-96db98: it could not be deleted (1 in a row, at most 20)"]
    ended, did, errors = of_tpu_vm(tmp_path, ["ACTIVE"], [0, 2], delete_when_done=True)
    assert (ended, did) == (2, ["ssh", "ssh"]) and errors[-1] == PAID


def script(arguments=None, target="v5p:4x4x4", setup="true", **options):
    return tpu_vm.render(asked(target, arguments), zone="z", project="p", setup=setup, **options)


def test_two_runs_whose_work_directories_end_alike_have_two_slices():
    scripts = [script([ARGUMENTS[0], f"--workdir={path}"]) for path in ("/a/griffin", "/a/griffin/", "/b/griffin")]
    names = [re.search("\nname=([^ ]+) ", one)[1] for one in scripts]
    assert names[0] == names[1] != names[2]
    other = script([ARGUMENTS[0], "--workdir=/c/griffin"])
    assert all(name.startswith("griffin-") and f"--node-id={name} " not in other for name in names)


def test_setups_and_arguments_may_have_lines_of_their_own():
    setup = "cat > notes <<END\nof this host\nEND\npip install -q ."
    said = sent(script(setup=setup), "setup")
    assert said.endswith(f"\n{setup}\n") and said.count("\n") == 5
    text = "--config.data.path=a\nEND\nb"
    said = sent(script([*ARGUMENTS, text]), "train")
    assert f" '{text}' --expect=tpu:64; }}\n" in said and said.endswith('\nexit "$status"\n')


@pytest.mark.parametrize("directory, of_home", [("~/my code", "'my code'"), ("~", "."), ("a~b", "'a~b'"), ("/a", "/a")])
def test_a_directory_below_the_home_of_the_hosts(directory, of_home):
    """Their shells begin in the home; in quotes, ~ would be a directory's name."""
    said = sent(script(directory=directory), "train")
    assert f"\ndirectory={of_home}\n" in said and '\ncd "$directory" || exit 3\n' in said


WAIT = "for _ in {1..12000}; do sleep 0.02;"  # not for ever, in case a test fails


class Host:
    """A host that the script for TPU VMs tells to train, with a stand-in for python: each start adds a line to ``starts``
    and does what ``program`` says."""

    def __init__(self, home, *program):
        (home / "jaxlinear").mkdir()
        self._home, self.starts, self.log = home, home / "starts", home / "griffin-96db98.log"
        stand_in(home / "python", f"echo start | tee -a {self.starts}", f"cd {home}", *program)
        self._command = sent(CASES["tpu_vm.sh"](), "train")

    def connect(self):
        """Runs the command in its own session, as sshd does."""
        environment = {"PATH": f"{self._home}:/bin:/usr/bin", "HOME": str(self._home)}
        # libtpu, which other tests in this process may have loaded, ignores SIGHUP, and a child would inherit that.
        session = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", "-c", self._command], env=environment, **pipes, **session)

    def wait_for(self, text, file=None):
        begin, file = time.monotonic(), file or self.log
        while not file.exists() or text not in file.read_text():
            assert time.monotonic() - begin < PATIENCE
            time.sleep(0.02)


def end_of(connection):
    """The status of a connection that has ended, and what it said."""
    said, _ = connection.communicate(timeout=PATIENCE)
    return connection.returncode, said


@pytest.mark.slow(but_nth=4)
@pytest.mark.parametrize("end, status", [(1, 101), (0, 0), (2, 2), (134, 134)])
def test_a_run_outlives_its_connection(tmp_path, end, status):
    """The next connection follows the run: no other run is started, and the status is the run's."""
    host = Host(tmp_path, f"{WAIT} [ -e go ] && break; done", "echo done", f"exit {end}")
    lost = host.connect()
    host.wait_for("start")
    os.killpg(lost.pid, signal.SIGHUP)
    assert end_of(lost)[0] == -signal.SIGHUP
    follows = host.connect()
    assert follows.stdout.readline() == "start\n"
    (tmp_path / "go").touch()
    assert end_of(follows) == (status, "done\n")
    assert host.starts.read_text() == "start\n"
    assert end_of(host.connect())[0] == status and host.starts.read_text() == "start\n" * 2


def test_a_machine_that_is_taken_away_tells_its_run(tmp_path):
    """SIGTERM and SIGHUP reach everything that a connection started, at once."""
    host = Host(tmp_path, "trap 'echo saved; exit 75' TERM", "echo ready", f"{WAIT} :; done")
    taken = host.connect()
    host.wait_for("ready")
    os.killpg(taken.pid, signal.SIGTERM)
    os.killpg(taken.pid, signal.SIGHUP)
    end_of(taken)
    host.wait_for("saved")
    status = tmp_path / "griffin-96db98.status"
    host.wait_for("\n", status)  # the file exists before it has content
    assert status.read_text() == "75\n" and host.starts.read_text() == "start\n"


def test_a_run_that_saved_itself_goes_on_in_its_place(tmp_path):
    host = Host(tmp_path, f"[ $(wc -l < {tmp_path}/starts) -lt 3 ] && exit 75", "exit 0")
    assert end_of(host.connect()) == (0, "start\n" * 3)


@pytest.mark.parametrize(
    "target, shape", [("v5p:2x2x16", "v5p --topology=2x2x16"), ("v5e:4x8", "v5litepod --topology=4x8")]
)
def test_a_slice_is_asked_for_by_its_shape(target, shape):
    assert f" --type={shape} " in script(target=target)
