"""A sweep whose runs are not trained: a program that writes what launch/train.py writes, in a moment and without JAX.

``python -m tests.sweeps.stand_in train --config=...:FILE --workdir=DIR`` is the program; ``... sweep DIR DATA`` runs a
sweep of eight runs of it, in a process that can be killed.
"""

import json
import os
import pathlib
import signal
import sys
import time

import tests

ROOT = pathlib.Path(next(iter(tests.__path__))).parent
TRAIN = [sys.executable, "-m", "tests.sweeps.stand_in", "train"]
STEPS, SECONDS = 6, 0.05
SEEDS = range(8)
BROKEN = 13  # a seed whose run fails
# A file in a sweep's directory that makes its tests independent of timing: while it is there, runs with its seed or a
# larger one wait in this step. They do respond to SIGTERM.
HOLD, HELD = "hold", 3


def train(config_file: str, workdir: str) -> int:
    """Saves a checkpoint every step. ``steps.txt`` lists the steps that were done, including those done again."""
    config, directory = json.loads(pathlib.Path(config_file).read_text()), pathlib.Path(workdir)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    if config["training"]["seed"] == BROKEN:
        print("working", "stand_in: this seed is broken", sep="\n", file=sys.stderr)
        return 2
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.tmp").write_text(json.dumps(config))
    os.replace(directory / "config.tmp", directory / "config.json")
    saved = [int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]
    for step in range(max(saved, default=0) + 1, config["training"]["steps"] + 1):
        time.sleep(SECONDS)
        while step == HELD and not stopped and config["training"]["seed"] >= first_held(directory.parents[1]):
            time.sleep(SECONDS)
        with (directory / "steps.txt").open("a") as file:
            file.write(f"{step}\n")
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 5 - step / 10, "heldout_loss": 5.5, "tokens": step}) + "\n")
        (directory / "checkpoints" / f"{step}.tmp").mkdir(parents=True)
        os.replace(directory / "checkpoints" / f"{step}.tmp", directory / "checkpoints" / str(step))
        if stopped and step < config["training"]["steps"]:
            return 75
    return 0


def first_held(sweep):
    try:
        return int((sweep / HOLD).read_text())
    except FileNotFoundError:
        return float("inf")


def runs(seeds=SEEDS):
    return [{"training.seed": seed} for seed in seeds]


def config(dataset, **changes):
    from jaxlinear import config as configs

    made = configs.default()
    small = dict(pattern=("rg_lru",), num_layers=1, width=8, recurrent_width=8, num_heads=1, vocab_size=384)
    made.model.update(small)
    made.data.path = str(dataset)
    made.training.update({"steps": STEPS} | changes)
    made.schedule.warmup_steps = 1
    return made


def sweep(directory, dataset, plan=None, *, parallel=4, show=lambda table: None, **changes) -> int:
    """Runs a manager in this process and returns its status."""
    from jaxlinear.sweeps import executors, manager
    from jaxlinear.sweeps.sweep import prepare

    with prepare(directory, config(dataset, **changes), plan or runs()) as planned:
        executor = executors.Local(planned.directory / "jobs" / "submitit", parallel=parallel)
        return manager.Manager(planned, executor, TRAIN).run(show, poll=0.05)


if __name__ == "__main__":
    if sys.argv[1] == "train":
        flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[2:])
        sys.exit(train(flags["config"].split(":", 1)[1], flags["workdir"]))
    sys.exit(sweep(*sys.argv[2:]))
