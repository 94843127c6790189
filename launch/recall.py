"""Trains layers on a synthetic task, one after another, and prints what each recalls:

python launch/recall.py --workdir=runs/recall

The task, the model size and the training are those of configs/mqar.py, except for config keys that are given for one
pattern, as in --patterns=gla,griffin:training.steps=4000. docs/evaluation.md has the table.
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from jaxlinear import cli, exit_status
from jaxlinear.errors import UserError

_MQAR = pathlib.Path(__file__).absolute().parents[1] / "configs" / "mqar.py"  # found wherever the program is started
_CONFIG = config_flags.DEFINE_config_file("config", str(_MQAR), "What to train: a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the runs; existing runs are resumed.", required=True)
_PATTERNS = flags.DEFINE_list(
    "patterns",
    [
        "gated_delta_net:training.steps=2000",
        "griffin:optimizer.muon_learning_rate=0.015:optimizer.learning_rate=0.03:optimizer.weight_decay=0.0"
        ":schedule.final_fraction=0.0:training.steps=4500",
        "linear_attention",
    ],
    "griffin, hawk, a mixer, or several as in rg_lru+sliding_window; each may have config keys of its own, as above.",
)
_EXAMPLES = flags.DEFINE_integer("examples", 1024, "Held-out examples for each pattern.", lower_bound=1)


def main() -> int:
    from jaxlinear.evaluation import recall
    from jaxlinear.parallel import distributed

    if not _PATTERNS.value:
        raise UserError("--patterns is empty; name layers, such as --patterns=gla,griffin")
    recall.check(_CONFIG.value, _PATTERNS.value)
    distributed.use_gpu_memory()
    cli.leave_out_warnings_of_orbax()
    rows = []
    for name in _PATTERNS.value:
        row = recall.train(_CONFIG.value, _WORKDIR.value, name, _EXAMPLES.value)
        if row is None:
            return exit_status.PREEMPTED
        rows.append(row)
    print(recall.table(_CONFIG.value.data.task, rows))
    return 0


if __name__ == "__main__":
    cli.run(main)
