"""What `make quickstart` trains: a Griffin of 1.8 M parameters on the sources of Python's standard library.

    make quickstart

About 2 M tokens in five to six minutes on two CPU cores; README.md shows the result.
"""

from jaxlinear import config as configs

VOCAB_SIZE = 2048  # of the byte-level BPE of the corpus


def get_config():
    config = configs.default()
    config.model.preset = "griffin_2m"
    config.model.dtype = "float32"
    config.training.batch_size = 4
    config.training.sequence_length = 512
    config.training.steps = 1000
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.015
    config.optimizer.muon_learning_rate = 0.03
    config.schedule.name = "linear"
    config.schedule.warmup_steps = 30
    config.schedule.final_fraction = 0.0
    config.checkpoint.every_steps = 250
    config.evaluation.every_steps = 250
    config.evaluation.batches = 16
    return config
