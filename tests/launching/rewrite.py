"""Writes the scripts and manifests in the golden files: python -m tests.launching.rewrite

Run it after an intended change, and read the difference before committing.
"""

import functools
import pathlib

from jaxlinear.launching import gke, request, slurm, tpu_vm

GOLDEN = pathlib.Path(__file__).parent / "golden"
ARGUMENTS = ["--config=configs/griffin_100m.py", "--workdir=/shared/runs/griffin", "--config.model.pattern=rg_lru,gla"]


def asked(target, arguments=None, name=None):
    return request.make(target, name, ARGUMENTS if arguments is None else arguments, python="python", on_a_host=None)


CASES = {
    "slurm.sh": lambda: slurm.render(asked("h100:16"), options={"partition": "gpu"}, setup=["module load cuda"]),
    "slurm_by_host.sh": lambda: slurm.render(asked("a100:4"), per="host", minutes=90, grace=60, cpus_per_task=24),
    "gke_tpu.yaml": lambda: gke.render(
        asked("v5e:4x8"),
        image="registry/jaxlinear:1",
        mounts=["gs://mine:/shared", "corpora:/data"],
        service_account="trainer",
        spot=True,
    ),
    "gke_slices.yaml": lambda: gke.render(
        asked("2xv6e:4x8"), image="registry/jaxlinear:1", mounts=["gs://mine:/shared"], queue="tpus"
    ),
    "gke_gpu.yaml": lambda: gke.render(
        asked("h100:16"), image="registry/jaxlinear:1", mounts=["runs:/shared/runs"], restarts=3
    ),
    "tpu_vm.sh": functools.partial(
        lambda setup: tpu_vm.render(asked("v5p:4x4x4"), zone="us-east5-a", project="mine", setup=setup, spot=True),
        "test -d jaxlinear || git clone -q /shared/jaxlinear; cd jaxlinear && pip install -q '.[tpu]'",
    ),
}


def rewrite() -> None:
    """Writes every golden file, and removes those of cases that no longer exist."""
    for stale in GOLDEN.iterdir():
        stale.unlink()
    for name, make in CASES.items():
        (GOLDEN / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    rewrite()
