"""Targets without hardware, and refused ones. test_compiled_collectives.py tests that programs compile for targets."""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest

from jaxlinear.costs import targets
from jaxlinear.errors import UserError
from jaxlinear.parallel import distributed

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.mark.parametrize(
    "name, devices, hosts, platform, gib",
    [
        ("v5e:2x4", 8, 2, "tpu", 15.75),
        ("v5e:1x1", 1, 1, "tpu", 15.75),
        ("v5p:4x4x4", 64, 16, "tpu", 95.74),
        ("v6e:16x16", 256, 64, "tpu", 31.25),
        ("tpu7x:2x2x2", 16, 2, "tpu", 94.75),  # a chip is two devices
        ("3xv5e:2x4", 24, 6, "tpu", 15.75),
        ("h100:4", 4, 1, "gpu", 71.19),
        ("h100:64", 64, 8, "gpu", 71.19),
    ],
)
def test_devices(name, devices, hosts, platform, gib):
    target = targets.find(name)
    assert len(target.devices) == devices
    assert len({device.process_index for device in target.devices}) == hosts
    assert {device.platform for device in target.devices} == {platform}
    assert target.memory_bytes / 2**30 == pytest.approx(gib, abs=0.01)
    assert target.slices == (3 if name.startswith("3x") else 1)


@pytest.mark.parametrize(
    "name, message",
    [
        ("v9:2x2", "a target is a TPU slice by its shape"),
        *((name, f"there is no target '{name}'") for name in ("h100", "h100:08", "v5e:2x2x1", "v6e:0x4", "0xv6e:2x4")),
        ("h100:0", "^h100:0 asks for no GPUs; the smallest target is h100:1$"),
        ("v5p:2x2", "there is no target 'v5p:2x2'; .*v5p:4x4x4"),
        ("tpu7x:2x4", "there is no target 'tpu7x:2x4'; .*tpu7x:4x4x4"),
        ("2xh100:8", "^2xh100:8: only TPU slices can be multiplied, .*; for GPUs give the total number"),
        ("2xv5e:3x3", "libtpu does not know the slice v5e:3x3: "),
        ("h100:12", "h100:12: more than 8 GPUs must fill whole hosts; the next that works is h100:16"),
        ("v5e:3x3", "libtpu does not know the slice v5e:3x3: .*not divisible"),
    ],
)
def test_what_is_no_target_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        targets.find(name)


@pytest.mark.parametrize(
    "name, module, package",
    [
        ("v5e:2x4", *["libtpu"] * 2),
        ("h100:8", "jax_plugins.xla_cuda13", "jax-cuda13-plugin"),
        ("h100:8", "nvidia", "ptxas"),
    ],
)
def test_a_missing_compiler_is_named(monkeypatch, name, module, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda of, *rest: None if of == module else found(of, *rest))
    monkeypatch.setattr(targets.shutil, "which", lambda *_, **__: None)
    with pytest.raises(UserError, match=rf"compiling for {name} needs {package}.*pip install 'jaxlinear\[aot\]'"):
        targets.find(name)


def test_a_gpu_program_compiles_with_nothing_on_the_path():
    """ptxas is found in its wheel, and a process needs only what the program itself sets."""
    program = """
from jaxlinear.costs import targets
targets.set_environment()
import jax, jax.numpy as jnp
place = jax.NamedSharding(jax.make_mesh((8,), ("x",), devices=targets.find("h100:8").devices), jax.P("x"))
x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=place)
print(jax.jit(lambda x: jnp.cumsum(jnp.sin(x), axis=1)).lower(x).compile().memory_analysis().output_size_in_bytes)
print(jax.default_backend())
"""
    environment = {"PATH": "/nonexistent", "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(64 * 128 * 4 // 8), "cpu"], done.stderr


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    targets.set_environment()
    assert os.environ["JAX_PLATFORMS"] == "cuda"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"


def test_a_run_takes_the_memory_of_a_gpu_that_is_reckoned_with(monkeypatch):
    """JAX reads the setting when it first asks for the GPUs."""
    from jaxlib import xla_client

    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.setattr(targets, "_gpus", lambda name, count: [])
    for given, name in itertools.product((None, "", "0.5"), names):
        for each in names:
            monkeypatch.setenv(each, "")  # what is set below is taken back after the test
            monkeypatch.delenv(each)
        if given is not None:
            monkeypatch.setenv(name, given)
        assumed = targets.find("h100:1").memory_bytes / 84_929_347_584
        distributed.use_gpu_memory()
        taken = xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"]
        assert taken == pytest.approx(assumed) == float(given or targets.GPU_MEMORY_FRACTION)
        assert targets.find("h100:1").memory_bytes / 84_929_347_584 == pytest.approx(assumed)


@pytest.mark.parametrize("given", ["much", "0", "nan"])
def test_a_fraction_of_memory_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", given)
    with pytest.raises(UserError, match=f"^XLA_PYTHON_CLIENT_MEM_FRACTION='{given}' must be a fraction"):
        distributed.use_gpu_memory()
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    with pytest.raises(UserError, match="are both set; JAX takes only one"):
        distributed.use_gpu_memory()
