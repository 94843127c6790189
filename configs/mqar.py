"""Multi-query associative recall (Zoology, arXiv:2312.04927): 8 key-value pairs in 64 tokens, vocabulary 512.

    python launch/recall.py --workdir=runs/recall

trains several patterns, each three layers deep, and prints what they recall; docs/evaluation.md has the results. Rows of
fewer pairs are mixed with those of 8, since from 8 alone Griffin does not begin to learn. Width 64, float32, Muon, rows of
64 tokens, 32 per step.
"""

from jaxlinear import config as configs


def get_config():
    config = configs.default()
    config.data.task = "mqar:pairs=1+2+4+8:vocab_size=512"
    config.model.pattern = ("gated_delta_net",)
    config.model.num_layers = 3
    config.model.width = 64
    config.model.num_heads = 1
    config.model.recurrent_heads = 2
    config.model.mlp_expansion = 2.0
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.training.batch_size = 32
    config.training.sequence_length = 64
    config.training.steps = 1500
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1.5e-2  # for vectors and the embedding
    config.optimizer.muon_learning_rate = 6e-3
    config.schedule.warmup_steps = 50
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_newest = 1
    config.evaluation.every_steps = 1000
    config.evaluation.batches = 8
    config.logging.every_steps = 50
    return config
