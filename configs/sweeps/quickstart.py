"""What `make sweep` trains: isoFLOP ladders of four architectures on the sources of Python's standard library.

    make sweep

Hawk, Griffin, GLA and a transformer, each in four sizes of 0.07 to 0.3 M parameters with three FLOP budgets: 48 runs, two
at a time, 60 minutes of CPU in all. A step has 512 tokens, since at these sizes more and smaller steps reach far lower
losses for the same FLOPs. docs/scaling.md has the results.
"""

from jaxlinear import config as configs
from jaxlinear.sweeps import plans

BUDGETS = (5e11, 1e12, 2e12)  # FLOPs, including those of the logits
HEADS = {24: 1, 32: 1, 48: 2, 64: 2}  # for each width
PRESETS = {"transformer": "transformer_6m", "hawk": "hawk_6m", "griffin": "griffin_6m", "gla": "gla_6m"}


def get_config():
    config = configs.default()
    config.model.num_layers = 3  # one period of Griffin
    config.model.vocab_size = 2048  # of the corpus
    config.model.dtype = "float32"
    config.training.batch_size = 2
    config.training.sequence_length = 256
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.015
    config.optimizer.muon_learning_rate = 0.03
    config.schedule.name = "linear"
    config.schedule.final_fraction = 0.0
    config.checkpoint.every_steps = 2000
    config.checkpoint.keep_newest = 1
    config.evaluation.every_steps = 1_000_000  # at the end only
    config.evaluation.batches = 128
    config.logging.every_steps = 50
    config.logging.tensorboard = False
    return config


def get_runs(config):
    sizes = plans.ladder(
        {name: [_size(preset, width) for width in HEADS] for name, preset in PRESETS.items()},
    )
    return plans.isoflops(config, sizes, BUDGETS, warmup_fraction=0.05)


def _size(preset, width):
    return {
        "size": f"w{width}",
        "model.preset": preset,
        "model.width": width,
        "model.recurrent_width": width,
        "model.num_heads": HEADS[width],
        "model.key_value_heads": HEADS[width] if preset.startswith("transformer") else 1,
    }
