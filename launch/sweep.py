"""Trains the runs of a sweep: python launch/sweep.py --config=configs/sweeps/NAME.py --workdir=DIR

Started again, it skips finished runs and resumes the others. docs/scaling.md explains it.
"""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from jaxlinear import cli, cli_flags, exit_status
from jaxlinear.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="The sweep's config: a file in configs/sweeps/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep; an existing sweep is resumed.", required=True)
_EXECUTOR = flags.DEFINE_enum("executor", "local", ["local", "slurm"], "Where submitit starts the runs.")
_PARALLEL = flags.DEFINE_integer("parallel", None, "Runs at a time; by default 1, with slurm all.", lower_bound=1)
_GPUS_PER_RUN = flags.DEFINE_integer("gpus_per_run", 0, "local: GPUs that each run sees; 0 means all.", lower_bound=0)
_SBATCH = flags.DEFINE_multi_string("sbatch", [], "slurm: an option of sbatch, e.g. --sbatch=partition=gpu.")
_STATUS = flags.DEFINE_boolean("status", False, "Only show the progress of the runs; needs no --config.")


def main() -> int:
    cli.leave_out_warnings_of_orbax()
    from jaxlinear.sweeps import states, sweep, table

    if _EXECUTOR.value == "local" and _SBATCH.value:
        raise UserError(f"--sbatch={_SBATCH.value[0]} is for --executor=slurm")
    if _EXECUTOR.value == "slurm" and _GPUS_PER_RUN.value:
        raise UserError("--gpus_per_run is for --executor=local; with slurm it is --sbatch=gpus-per-node=N")
    if _STATUS.value:
        print(table.text([(run.name, run.progress()) for run in sweep.read(_WORKDIR.value).runs]))
        return 0
    if _CONFIG.value is None:
        raise UserError("which sweep? --config=configs/sweeps/NAME.py")

    try:
        from jaxlinear.sweeps import executors, manager
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        raise UserError("starting the runs of a sweep needs submitit: pip install 'jaxlinear[sweep]'") from None
    file = cli_flags.config_file(config_flags.get_config_filename(flags.FLAGS["config"]))
    plan = cli.load_module(file)
    if not hasattr(plan, "get_runs"):
        raise UserError(f"{file} is the config of a run, not of a sweep: it has no get_runs(config)")
    runs = plan.get_runs(_CONFIG.value)
    with sweep.prepare(_WORKDIR.value, _CONFIG.value, runs) as planned:
        folder = planned.directory / "jobs" / "submitit"
        executor = (
            executors.Local(folder, parallel=_PARALLEL.value or 1, gpus_per_run=_GPUS_PER_RUN.value)
            if _EXECUTOR.value == "local"
            else executors.Slurm(folder, parallel=_PARALLEL.value, options=_SBATCH.value)
        )
        train = [sys.executable, str(pathlib.Path(__file__).absolute().with_name("train.py"))]
        work = manager.Manager(planned, executor, train)
        status = work.run(table.Live(sys.stdout).show)
        rows = work.progress()
    for name, progress in rows:
        if progress.state == states.FAILED:
            print(f"{name} failed: {progress.error} (all of it: {planned.directory / 'jobs' / name / 'log.txt'})")
    print(table.summary(rows))
    if status == exit_status.PREEMPTED:
        print("stopped; the same command resumes from there" + " and finds its jobs" * (_EXECUTOR.value == "slurm"))
    return status


if __name__ == "__main__":
    cli.run(main)
