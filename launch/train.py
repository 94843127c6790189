"""Trains a model: python launch/train.py --config=configs/NAME.py --workdir=DIR [--config.section.key=VALUE ...]"""

from absl import flags
from ml_collections import config_flags

from jaxlinear import cli, exit_status

_CONFIG = config_flags.DEFINE_config_file("config", help_string="What to train: a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; an existing run is resumed.", required=True)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if no scheduler gives it.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes that train together.")
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")
_EXPECT = flags.DEFINE_string("expect", None, "PLATFORM:DEVICES that all processes together must see to go on.")
flags.mark_flag_as_required("config")


def main() -> int:
    from jaxlinear.parallel import distributed
    from jaxlinear.training.loop import train

    distributed.use_gpu_memory()
    distributed.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if _EXPECT.value:
        distributed.expect(_EXPECT.value)
    return train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    cli.end_by_sigterm(exit_status.PREEMPTED)  # as for a run that saved itself: the same command resumes it
    cli.run(main, waits_for_threads=False)
