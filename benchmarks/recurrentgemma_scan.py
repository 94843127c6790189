"""The comparison side of benchmarks/tpu_kernels.py: the Pallas scan of the `recurrentgemma` package, compiled for a TPU.

The script uses nothing from jaxlinear and runs under the Python of the environment of recurrentgemma.txt, plus libtpu:

    python3.11 -m venv RG && RG/bin/pip install -r benchmarks/recurrentgemma.txt libtpu==0.0.42.1
    RG/bin/python benchmarks/recurrentgemma_scan.py v5e:2x2 forward 4 4096 2560 float32

It prints one JSON line: `schedules.report` of the package's unchanged `lru_pallas_scan`, forward or with its gradients.
"""

import json
import sys

import schedules

directory = schedules.begin()

import jax  # noqa: E402
from recurrentgemma.jax import pallas  # noqa: E402


def main(topology: str, direction: str, batch: str, length: str, width: str, dtype: str) -> None:
    x = jax.ShapeDtypeStruct((int(batch), int(length), int(width)), dtype)
    state = jax.ShapeDtypeStruct((int(batch), int(width)), "float32")

    def forward(a, x, state):
        return pallas.lru_pallas_scan(x, a, state)

    def gradient(a, x, state, cotangents):
        outputs, pullback = jax.vjp(forward, a, x, state)
        return outputs, pullback(cotangents)

    function = forward if direction == "forward" else gradient
    cotangents = () if direction == "forward" else ((x, state),)
    compiled = schedules.compile_for(topology, function, x, x, state, *cotangents)
    print(json.dumps(schedules.report(directory, compiled, topology)))


if __name__ == "__main__":
    main(*sys.argv[1:])
