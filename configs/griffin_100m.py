"""Griffin 100M on 2 B tokens of a prepared dataset: about 20 tokens per parameter.

    python launch/prepare_data.py --source=TEXT --output=DATA --vocab_size=32000
    python launch/train.py --config=configs/griffin_100m.py --workdir=RUN --config.data.path=DATA

The config is meant for one host with 8 accelerators of 32 GB or more; with 16 GB, as v5e has, the step fits with
`--config.training.microbatches=4` (launch/compile.py). We have not yet trained it to its end, so no loss is quoted.
`--config.mesh.fsdp=8 --config.mesh.data=1` splits the parameters too; `--config.model.preset=hawk_100m` trains Hawk.
"""

from jaxlinear import config as configs


def get_config():
    config = configs.default()
    config.model.preset = "griffin_100m"
    config.training.batch_size = 256
    config.training.sequence_length = 2048
    config.training.steps = 4_000
    config.training.spike_multiple = 10.0
    config.optimizer.learning_rate = 2e-3
    config.schedule.warmup_steps = 200
    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every_steps = 2000
    config.evaluation.every_steps = 500
    return config
