"""Exit statuses and the one-line messages for bad input, in this process and through launch/train.py."""

import ast
import errno
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys

import absl.logging  # noqa: F401 (it defines the flag --verbosity)
import jax
import pytest

from jaxlinear import cli
from jaxlinear import config as configs
from jaxlinear.errors import Diverged, RunError, UserError

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def logger():
    """Restores the logger: ``cli.run`` shows the library's messages on stderr, and other tests collect them."""
    messages = logging.getLogger("jaxlinear")
    before = messages.level, messages.propagate, list(messages.handlers)
    yield
    messages.level, messages.propagate, messages.handlers = before


def run(main, *arguments):
    """The status with which ``cli.run`` exits."""
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, ["path/to/program.py", *arguments])
    return exit_.value.code


def raises(error):
    def main():
        raise error

    return main


TOO_LARGE = "a file would be larger than the file system or the limit of this process (ulimit -f) permits: a/b"


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (75, 75)])
def test_the_status_is_what_main_returns(returned, status, capsys):
    assert run(lambda: returned) == status
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("this is\n  wrong"), 2, "this is wrong"),
        (RunError("the others did not connect"), 1, "the others did not connect"),
        (Diverged("it diverged"), 2, "it diverged"),
        (OSError(errno.ENOSPC, "x", "a/b"), 2, "no space left on the disk: a/b"),
        (OSError(errno.EROFS, "x", "a/b"), 2, "the file system is read-only: a/b"),
        (PermissionError(errno.EACCES, "x", "a/b"), 2, "permission denied: a/b"),
        (NotADirectoryError(errno.ENOTDIR, "x", "a/b"), 2, "a part of the path is not a directory: a/b"),
        (OSError(errno.ENAMETOOLONG, "x", "a/b"), 2, "a name in the path is too long: a/b"),
        (OSError(errno.EDQUOT, "no more"), 2, "the disk quota is used up: no more"),
        (OSError(errno.EFBIG, "x", "a/b"), 2, TOO_LARGE),
        (OSError(errno.EIO, "x", "a/b"), 1, "a disk or a file server failed (input/output error): a/b"),
        (OSError(errno.EIO, "x"), 1, "a disk or a file server failed (input/output error)"),
        (OSError(errno.ESTALE, "x"), 1, "a file server no longer knows a file that was open (stale file handle)"),
        (OSError(errno.ENOTCONN, "x", "a/b"), 1, "a file system is no longer mounted (not connected): a/b"),
    ],
)
def test_bad_input_is_one_line(error, status, line, capsys):
    assert run(raises(error)) == status
    assert capsys.readouterr() == ("", f"program.py: {line}\n")


def test_too_little_memory_is_one_line(capsys):
    text = "RESOURCE_EXHAUSTED: Out of memory allocating 413997377040 bytes.\nA table of buffers"
    assert run(raises(jax.errors.JaxRuntimeError(text))) == 2
    _, error = capsys.readouterr()
    assert error.startswith(f"program.py: a device does not have enough memory: {text.splitlines()[0]}; ")
    assert error.count("\n") == 1
    full = "RESOURCE_EXHAUSTED: write failed: No space left on device"
    with pytest.raises(jax.errors.JaxRuntimeError, match=full):
        run(raises(jax.errors.JaxRuntimeError(full)))


@pytest.mark.parametrize("error", [ValueError("a defect"), FileNotFoundError(errno.ENOENT, "x"), KeyError("k")])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raises(error), ["program.py"])


@pytest.mark.parametrize(
    "argument, line",
    [
        ("train", "unexpected argument 'train': every option is written --name=value"),
        ("--verbositty=1", "Unknown command line flag 'verbositty'. Did you mean: verbosity ?"),
    ],
)
def test_arguments_that_are_not_understood(argument, line, capsys):
    assert run(lambda: None, argument) == 2
    assert capsys.readouterr() == ("", f"program.py: {line}\n")


def help_of(start, program, *arguments):
    done = start(program, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("program", sorted(file.stem for file in (REPOSITORY / "launch").glob("*.py")))
def test_every_program_has_help(start, program):
    """The help has its docstring and every flag it defines, and says which are required; --help needs no other flag."""
    source = (REPOSITORY / "launch" / f"{program}.py").read_text()
    text = help_of(start, program, "--help")
    assert text.startswith(ast.get_docstring(ast.parse(source)))
    defined = re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source)
    assert re.findall(r"^  --(?:\[no\])?(\w+):", text, re.MULTILINE) == sorted(defined) and defined
    required = re.findall(r"\"(\w+)\",[^=]*required=True|mark_flag_as_required\(\"(\w+)\"\)", source)
    found = re.search(r"^required: (.*)", text, re.MULTILINE)
    assert sorted(found[1].split() if found else []) == sorted(f"--{a or b}" for a, b in required)


def test_help_has_every_key_of_the_config(start, tmp_path):
    text = help_of(start, "train", "--helpfull", f"--workdir={tmp_path}")
    assert re.findall(r"^  --config\.([\w.]+): \w+", text, re.MULTILINE) == list(configs.KEYS)
    assert "  --config.model.window: int, by default 1024\n    Tokens that local attention sees, the present" in text


def test_help_behind_two_dashes_is_anothers():
    """For example, launch/train.py's, after launch/submit.py's own flags."""
    seen = []
    with pytest.raises(SystemExit):
        cli.run(seen.extend, ["submit.py", "--", "--help"], takes_arguments=True)
    assert seen == ["--help"]


LIKELIEST = "--temperature=0 takes the likeliest token, so that --top_k would do nothing; leave it out"
GRIFFIN, NO_URL = "--config=configs/griffin_100m.py", "a path must be in a file system, not {}; mount the bucket on"


@pytest.mark.parametrize(
    "program, arguments, message",
    [
        ("compile", f"{GRIFFIN} --topology=h100:1 --json=no/x", "--json=no/x: its directory does"),
        ("evaluate", "--workdir=x --json=no/x", "--json=no/x: its directory does not exist"),
        ("plot", "--workdir=x --output=no/x.png", "--output=no/x.png: its directory does not exist"),
        ("report", "--workdir=x --output=docs", "--output=docs is a directory; name a file in it"),
        ("report", "--workdir=x --output=no/x.html", "--output=no/x.html: its directory does not exist"),
        ("evaluate", "--workdir=", "--workdir is empty; give it a path"),
        ("evaluate", "--workdir=x --poll=3", "--poll is for --follow, which waits for checkpoints; leave it out"),
        ("report", "--workdir=x --max_tokens=5", "--max_tokens is for the samples of --prompt; give a --prompt"),
        (
            "generate",
            "--workdir=x --prompt=a --temperature=0 --top_k=3 --seed=1",
            "--temperature=0 takes the likeliest ",
        ),
        ("recall", "--workdir=x --patterns=", "--patterns is empty; name layers, such as --patterns=gla,griffin"),
        ("recall", "--workdir=x --examples=0", "flag --examples=0: 0 is not a positive integer"),
        ("scaling", "--workdir=x --output=README.md", "--output=README.md is a file, but the report has several files"),
        # ``pathlib`` would make local directories of URLs, which are lost with the machine.
        ("train", f"{GRIFFIN} --workdir=gs://bucket/run", "--workdir=gs://bucket/run: " + NO_URL.format("gs://")),
        ("plot", "--workdir=runs/a --workdir=s3:/bucket/run", "--workdir=s3:/bucket/run: " + NO_URL.format("s3:/")),
        (
            "submit",
            f"--platform=slurm --target=h100:8 -- {GRIFFIN} --workdir=gs://bucket/run",
            "--workdir=gs://bucket/run: " + NO_URL.format("gs://"),
        ),
        ("train", "--workdir=x", "--config is missing; --help lists the options\n"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_begun(start, program, arguments, message):
    done = start(program, *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{program}.py: {message}") and done.stderr.count("\n") == 1
    assert not [name for name in ("gs:", "s3:", "x", "runs/a") if (REPOSITORY / name).exists()]


def test_a_home_that_no_shell_put_in_is_refused(monkeypatch):
    """Shells do not expand ~ after =, and a directory called ~ would be made where the program runs."""
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(UserError, match=r"^--output=~/a: a shell does not .* after =; write --output=/home/me/a$"):
        cli.check_path("output", "~/a")
    for path in ("a/~", "~no-such-user/a", "a~"):
        cli.check_path("output", path)


@pytest.mark.slow
def test_the_config_of_a_program_is_found_from_anywhere(tmp_path):
    command = [sys.executable, REPOSITORY / "launch" / "recall.py", "--workdir=x", "--config.training.steps=many"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("recall.py: flag --config.training.steps=many: invalid literal for int()")


BAD_CONFIG = """
from jaxlinear import config as configs

def get_config():
    config = configs.default()
    LINE
    return config
"""
G100, G2, STEPS = (
    "config.model.preset = 'griffin_100m'",
    "config.model.preset = 'griffin_2m'",
    "--config.training.steps=3",
)
TASKS, NO_OPTION = f"{G2}; config.data.task = 'parity'", "mqar has no option 'lengt'"
NOT_FOUND = "FILE, line 6: FileNotFoundError: [Errno 2] No such file or directory: 'not_there'"


@pytest.mark.parametrize(
    "line, arguments, message",
    [
        ("pass", ["--config.model.wdth=3"], "there is no config key 'model.wdth'; did you mean 'model.width'?"),
        ("pass", ["--noconfig.loging.layer_norms"], "there is no config key 'loging.layer_norms'; did you mean"),
        ("pass", ["--config.training.steps=2.5"], "flag --config.training.steps=2.5: invalid literal for int()"),
        ("pass", ["--config.model.pattern=gla"], "without model.preset these keys need a value: model.num_heads"),
        ("pass", ["--config=FILE_"], "there is no config file 'FILE_'; did you mean 'FILE'?"),
        ("config.model.wdth = 3", [], 'FILE, line 6: there is no config key "wdth"; did you mean "width"?'),
        ("config.model.update({'wdth': 3})", [], 'FILE, line 6: there is no config key "wdth"; did you mean "width"?'),
        ("config.zzz.width = 3", [], 'FILE, line 6: there is no config key "zzz"'),
        ("config.model.width = 'wide'", [], "FILE, line 6: Could not override field 'width' (reference). wide is of"),
        ("config.model.pattern = 'gla, s5'", [], "FILE, line 6: pattern is the string 'gla, s5'; it must be a tuple"),
        ("{}['key']", [], "FILE, line 6: KeyError: 'key'"),
        ("config.training.steps = 1 // 0", [], "FILE, line 6: ZeroDivisionError: integer division or modulo by zero"),
        ("config.training.steps = int('a')", [], "FILE, line 6: ValueError: invalid literal for int() with base 10"),
        ("import not_there", [], "FILE, line 6: ModuleNotFoundError: No module named 'not_there'"),
        ("open('not_there')", [], NOT_FOUND),
        ("import pathlib; pathlib.Path('not_there').read_text()", [STEPS], NOT_FOUND),
        ("pass", ["--config=FILE:argument"], "train.py: FILE: get_config() takes 0 positional arguments but 1 was"),
        ("config.model.width = (", [], "FILE, line 6: '(' was never closed"),
        ("config.model = dict(width=64)", [], "the config has no model.preset; get_config() must take"),
        ("config.model = dict(width=64)", [STEPS], "the config has no model.preset"),
        ("return dict(model=1)", [], "the config has no model.preset; get_config() must take"),
        ("return dict(model=1)", [STEPS], "FILE: get_config() must return jaxlinear.config.def"),
        ("config = 3\n", [], "FILE: get_config() must return jaxlinear.config.default() with keys changed: module"),
        (
            "# Notes\n\nThese are words.\n",
            [],
            "FILE, line 3: invalid syntax (it is not a Python file; a config file must",
        ),
        (
            G100,
            ["--config.optimizer.muon_learning_rate=0.1"],
            "does nothing for optimizer.name=adamw: only muon reads it",
        ),
        (  # a change on the command line may leave keys of the file with no reader
            "config.model.update({'preset': 'griffin_100m', 'window': 64}); config.schedule.final_fraction = 0.0",
            ["--config.model.pattern=gla", "--config.schedule.name=constant"],
            "data.path is not set",
        ),
        (G100, [], "data.path is not set; launch/prepare_data.py makes a dataset"),
        (G100, ["--config.data.path=no/data"], "no dataset at no/data: the directory"),
        # Names of a tuple need be no Python.
        (TASKS, ["--config.evaluation.tasks=parity,mqar:lengt=64"], NO_OPTION),
        (TASKS, ["--config.evaluation.tasks", "parity, mqar:lengt=64"], NO_OPTION),
        (TASKS, ["--config.evaluation.tasks=('parity','mqar:lengt=64')"], NO_OPTION),
    ],
)
def test_train_refuses_bad_input(start, tmp_path, line, arguments, message):
    """A config of this line, or a file of these lines."""
    file = tmp_path / ("notes.md" if line.startswith("#") else "small.py")
    file.write_text(line if "\n" in line else BAD_CONFIG.replace("LINE", line))
    named = lambda text: text.replace("FILE_", f"{tmp_path}/smal.py").replace("FILE", str(file))  # noqa: E731
    done = start("train", f"--workdir={tmp_path / 'run'}", f"--config={file}", *map(named, arguments))
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and done.stderr.startswith("train.py: ") and done.stderr.count("\n") == 1, done.stderr
    assert named(message) in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line, said",
    [
        # A defect of what a config file calls keeps its traceback.
        ("import sys; sys.path.append('FOLDER'); import other_module; other_module.value()", "KeyError: 'key'\n"),
        # A disk that fails may be mended, so the status is not the one of errors that a restart would not fix.
        ("raise OSError(5, 'Input/output error')", "Input/output error"),
    ],
)
def test_what_is_no_error_of_a_config_file(start, tmp_path, line, said):
    file = tmp_path / "small.py"
    (tmp_path / "other_module.py").write_text("def value():\n    return {}['key']\n")
    file.write_text(BAD_CONFIG.replace("LINE", line.replace("FOLDER", str(tmp_path))))
    done = start("train", f"--workdir={tmp_path / 'run'}", f"--config={file}")
    assert done.returncode == 1 and said in done.stderr[-len(said) - 80 :]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    there, new, link, nowhere = (tmp_path / name for name in ("there", "new", "link", "nowhere"))
    there.touch()
    link.symlink_to(new)
    nowhere.symlink_to(tmp_path / "none" / "x")
    for path in (there, new, link):
        cli.check_output("json", str(path))
    with pytest.raises(UserError, match=f"^--json={nowhere}: its directory does not exist"):
        cli.check_output("json", str(nowhere))
    refused = {tmp_path}
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) not in refused)
    cli.check_output("json", str(there))
    with pytest.raises(UserError, match=f"^--json={new} cannot be written: the disk is read-only"):
        cli.check_output("json", str(new))
    refused = {there}
    with pytest.raises(UserError, match=f"^--json={there} cannot be written"):
        cli.check_output("json", str(there))


def test_messages_of_the_library_are_shown_once(capsys):
    def main():
        logging.getLogger("jaxlinear.training.loop").info("saved at step %d", 3)

    for _ in range(2):
        assert run(main) == 0
        assert capsys.readouterr().err.count("saved at step 3") <= 1
    logging.getLogger("jaxlinear").handlers.clear()
    assert run(main) == 0
    assert capsys.readouterr().err == "saved at step 3\n"


NOTHING = "program: SIGTERM, with nothing to save"


@pytest.mark.parametrize(
    "before, then, status, said",
    [
        # As if within C++: no Python handler runs in the main thread.
        ("signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})", "ctypes.CDLL(None).sleep(600)", 75, NOTHING),
        ("", "time.sleep(600)", 75, NOTHING),
        # Even if both threads have time, only one says it.
        ("exit = os._exit; os._exit = lambda status: (time.sleep(0.5), exit(status))", "time.sleep(600)", 75, NOTHING),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit('heard'))", "time.sleep(600)", 1, "heard"),
        ("os.kill(os.getpid(), signal.SIGINT)", "time.sleep(600)", -signal.SIGINT, ""),  # Ctrl-C, without a traceback
    ],
)
def test_sigterm_before_there_is_anything_to_save(before, then, status, said):
    """A run that receives it while starting has not failed; once the run handles it, it saves a checkpoint."""
    lines = [
        "import ctypes, os, signal, sys, threading, time; from jaxlinear import cli; sys.argv[0] = 'program'",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",  # tests in the background inherit it ignored
        "cli.end_by_sigterm(75)",
        before,
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()",
        then,
    ]
    done = in_python("\n".join(lines))
    assert (done.returncode, done.stderr.strip()) == (status, said)


def in_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    "what, status, said",
    [
        ("raise UserError('no space')", 2, "program: no space"),
        ("raise OSError(errno.ENOSPC, 'full', 'file')", 2, "program: no space left on the disk: file"),
        ("raise ValueError('a defect')", 1, "ValueError: a defect"),
        ("raise FileNotFoundError(errno.ENOENT, 'a defect')", 1, "FileNotFoundError: [Errno 2] a defect"),
    ],
)
def test_a_failure_waits_for_no_thread(what, status, said):
    """For example, for Orbax's threads, which wait for a checkpoint that could not be written."""
    code = (
        "import errno, threading; from jaxlinear import cli; from jaxlinear.errors import UserError\n"
        f"def main():\n  threading.Thread(target=threading.Event().wait, args=(300,)).start()\n  {what}\n"
        "cli.run(main, ['program'], waits_for_threads=False)"
    )
    done = in_python(code)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (status, said)
