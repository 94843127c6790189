"""The mixers reimplemented from their equations in float64 NumPy: ``oracle(parameters, x [B, T, D], ids, config)`` -> y,
from an empty past. One file per family, each with its ``ORACLES`` by mixer name."""

from tests.mixer_oracles import attention, delta_rule, diagonal, griffin, linear_attention

ORACLES = attention.ORACLES | griffin.ORACLES | delta_rule.ORACLES | linear_attention.ORACLES | diagonal.ORACLES
