"""What `make quickstart` trains: a small Griffin on the standard library's sources."""

from jaxlinear import config as configs


def get_config():
    config = configs.default()
    config.model.preset = "griffin_3m"
    config.model.dtype = "float32"
    config.training.batch_size = 8
    config.training.sequence_length = 512
    config.training.steps = 400
    config.schedule.warmup_steps = 20
    return config
