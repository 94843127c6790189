"""``launch/check.py``: correct kernels pass, wrong ones do not; and which operations and inputs it checks."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxlinear import config as configs
from jaxlinear import ops
from jaxlinear.costs import targets
from jaxlinear.errors import UserError
from jaxlinear.launching import check_inputs, device_check, device_check_text
from jaxlinear.launching.device_check import Checked, Error
from jaxlinear.models import presets
from jaxlinear.ops import backends
from jaxlinear.ops.calls import Call
from jaxlinear.pallas.linear_attention import blocks as linear_attention_blocks
from jaxlinear.pallas.scan import blocks as scan_blocks
from jaxlinear.parallel import compiler
from tests.training import tiny

SMALL = [name for name in presets.PRESETS if name.endswith(("_2m", "_6m"))]
OPERATIONS = {
    "linear_recurrence": {"griffin_2m", "griffin_6m", "hawk_6m", "hgrn_6m", "s5_6m", "lru_6m", "gateloop_6m"},
    "linear_attention": {"mamba2_6m", "gla_6m", "hgrn2_6m", "lightning_6m", "linear_attention_6m", "retnet_6m"},
    "delta_rule": {"delta_net_6m", "gated_delta_net_6m", "kda_6m"},
    "rg_lru_gates": {"griffin_2m", "griffin_6m", "hawk_6m"},
    "selective_scan": {"mamba_6m", "longhorn_6m"},
    "sliding_window_attention": {"griffin_2m", "griffin_6m"},
    "causal_attention": {"transformer_6m"},
}
GATES = {"recurrence_kernel", "input_kernel", "recurrence_bias", "input_bias", "rate"}
ARRAYS = {"linear_recurrence": {"a", "x", "initial_state"}, "rg_lru_gates": {"x"} | GATES}
CONSTANTS = {
    "lightning_6m": {"log_decay"},
    "retnet_6m": {"log_decay"},
    "mamba_6m": {"A"},
    "s5_6m": {"a"},
    "lru_6m": {"a"},
}
ONE_LAYER = {"num_layers": 1, "width": 32, "num_heads": 2}


def config(preset, **model):
    config = configs.default()
    config.model.update({"preset": preset, **model})
    return config


def check(preset, length, **model):
    small = config(preset, **ONE_LAYER, **model)
    return list(device_check.check(small, jax.devices()[0], length=length, rows=1))


def calls(config, target, rows=1, length=150):
    return device_check._calls(configs.resolve(config), targets.find(target).devices[0], rows, length)


def checked(call, inputs="weak"):
    return device_check._check(call, inputs, *jax.devices()[:1] * 2)


def arrays_of(found):
    return {error.array for error in found.errors}


def outcomes(found):
    return [(x.operation, x.inputs, x.is_right) for x in found]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(scan_blocks, "_TPU_ELSEWHERE", scan_blocks.Block(128, 128, 16))
    monkeypatch.setattr(linear_attention_blocks, "_TPU_ELSEWHERE", (linear_attention_blocks.Block(64, 32, 1),) * 2)


def test_right_kernels(small_blocks):
    """The recurrence is in float32, the activations of its gates in bfloat16."""
    found, names = check("hawk_6m", 150, recurrent_width=32), ("rg_lru_gates", "linear_recurrence")
    assert outcomes(found) == [(name, kind, True) for name in names for kind in check_inputs.KINDS]
    expected = {
        "linear_recurrence": ("float32", 1e-5, {"output", "last state"}),
        "rg_lru_gates": ("bfloat16", 2e-2, {"transition", "input"}),
    }
    for x, tokens in zip(found, [150, 150, 113] * 2, strict=True):
        dtype, most, outputs = expected[x.operation]
        assert x.shapes["x"] == f"{dtype}[1, {tokens}, 32]"
        assert arrays_of(x) == outputs | {f"gradient of {array}" for array in ARRAYS[x.operation]}
        assert max(error.kernel for error in x.errors) < most


def test_gates_and_recurrence_as_one_kernel():
    """On a TPU they are, but where a mesh spreads time."""
    found = calls(config("hawk_6m", **ONE_LAYER, recurrent_width=32), "v5e:1x1")
    assert [call.operation for call in found] == ["short_convolution", "rg_lru", "rg_lru_gates", "linear_recurrence"]
    sizes = ONE_LAYER | {"num_layers": 2, "recurrent_width": 32}
    others = calls(config("hawk_6m", pattern=("rg_lru", "hgrn"), **sizes), "v5e:1x1")
    names = ["short_convolution", "rg_lru", "linear_recurrence", "rg_lru_gates", "linear_recurrence"]
    assert [call.operation for call in others] == names
    assert check_inputs.constants(found[1]) == GATES
    gradients = {f"gradient of {name}" for name in ("x", "initial_state", *GATES)}
    for kind in check_inputs.kinds_of(found[1]):
        one = checked(found[1], kind)
        assert one.is_right and one.worst.kernel < 2e-2
        assert arrays_of(one) == {"output", "last state", *gradients}


@pytest.mark.parametrize(
    "preset, norm, activation",
    [
        *(("gla_6m", {}, "silu"), ("gated_delta_net_6m", {}, "silu"), ("kda_6m", {}, "sigmoid")),
        ("retnet_6m", {"head_norm": "rms"}, "silu"),
    ],
)
def test_mixers_whose_norm_and_gate_are_one_kernel(preset, norm, activation):
    sizes = ONE_LAYER | {"key_width": 64, "value_width": 128, "width": 64}
    *_, found = calls(config(preset, **sizes, **norm), "v5e:1x1")
    assert found.operation == "gated_rms_norm"
    assert {"norm_before_gate": True, "activation": activation}.items() <= found.options.items()


def test_right_kernels_in_bfloat16(small_blocks):
    """An operation with decays runs on every kind of input."""
    found = check("lightning_6m", 150, key_width=16, value_width=16)
    assert outcomes(found) == [("linear_attention", kind, True) for kind in check_inputs.KINDS]
    errors = [error for x in found for error in x.errors]
    assert {error.array for error in errors} >= {"output", "last state", "gradient of log_decay"}
    assert 1e-4 < max(error.kernel for error in errors if error.array != "gradient of log_decay") < 2e-2


@pytest.mark.parametrize("wrong", ["one token", "nan", "gradient"])
def test_a_wrong_kernel_is_found(monkeypatch, small_blocks, wrong):
    operation = ops.linear_recurrence

    @jax.custom_vjp
    def off_backward(x):
        return x

    off_backward.defvjp(lambda x: (x, None), lambda _, d_x: (d_x.at[:, 50].multiply(1.001),))

    @functools.wraps(operation)
    def linear_recurrence(a, x, *arguments, backend="auto", **options):
        if backend == "pallas" and wrong == "gradient":
            x = off_backward(x)
        h, final = operation(a, x, *arguments, backend=backend, **options)
        if backend == "pallas" and wrong != "gradient":
            h = h.at[:, 50, 3].multiply(jnp.nan if wrong == "nan" else 1.01)
        return h, final

    wrong_spec = dataclasses.replace(ops.SPECS["linear_recurrence"], operation=linear_recurrence)
    monkeypatch.setitem(ops.SPECS, "linear_recurrence", wrong_spec)
    x = jax.ShapeDtypeStruct((1, 100, 4), jnp.float32)
    found = checked(Call("linear_recurrence", (("a", x), ("x", x))))
    assert not found.is_right and not found.worst.is_small
    wrong_array = "gradient of x" if wrong == "gradient" else "output"
    assert wrong_array in {error.array for error in found.errors if not error.is_small}
    assert "WRONG" in device_check_text.line(found)
    verdict = "wrong on this device: the kernels of linear_recurrence; --config.model.kernels=False trains without any"
    assert device_check_text.verdict([found]) == verdict


@pytest.mark.parametrize("preset", SMALL)
def test_what_every_model_calls(preset):
    """The model's operations, with inputs that satisfy each operation's conditions on its arguments."""
    found = device_check._calls(configs.resolve(config(preset)), jax.devices()[0], 2, 300)
    assert {call.operation for call in found} == {name for name, models in OPERATIONS.items() if preset in models}
    for call in found:
        expected = GATES if call.operation == "rg_lru_gates" else CONSTANTS.get(preset, set())
        assert check_inputs.constants(call) == expected
        for kind in check_inputs.kinds_of(call):
            drawn = check_inputs.draw(call, kind, np.random.default_rng(0))
            assert {name: (x.shape, x.dtype) for name, x in drawn.items()} == {
                name: (x.shape, x.dtype) for name, x in call.arrays.items()
            }
            numbers = {name: x.astype(np.result_type(x.dtype, np.float32)) for name, x in drawn.items()}
            assert all(np.isfinite(x).all() for x in numbers.values())
            assert np.all(numbers.get("log_decay", 0) <= 0) and np.all(np.abs(numbers.get("a", 0)) <= 1 + 1e-6)
            if call.operation == "rg_lru_gates":
                assert np.all(numbers["rate"] <= 0) and np.all(numbers["first"][:, 0]) and np.sum(numbers["first"]) > 2
            else:
                assert len(np.unique(numbers["segment_ids"][0])) > 1
            if call.operation == "delta_rule":
                assert np.all(numbers["beta"] >= 0) and np.all(numbers["beta"] <= 1)
                np.testing.assert_allclose(np.linalg.norm(numbers["k"], axis=-1), 1, atol=0.02)
            if call.operation == "selective_scan":
                assert np.all(numbers["dt"] >= 0) and np.all(numbers.get("A", 0) <= 0)
                if "A" not in numbers:
                    written = numbers["dt"] * np.max(numbers["B"] ** 2, axis=-1, keepdims=True)
                    assert np.all(written <= 1.02)


@pytest.mark.parametrize("target", ["v5e:1x1", "h100:1"])
@pytest.mark.parametrize(
    "mixer, heads", [("delta_net", [16, None]), ("mamba", [None]), ("mamba2", []), ("rg_lru", {"v5e:1x1": [None]})]
)
def test_where_convolutions_are_kernels(mixer, target, heads):
    """With the heads that get unit length."""
    sizes = {"num_layers": 1, "width": 64, "num_heads": 4, "key_width": 0 if mixer == "rg_lru" else 16}
    sizes |= {} if mixer == "delta_net" else {"recurrent_width": 128}
    found = calls(config("delta_net_6m", pattern=(mixer,), dtype="bfloat16", **sizes), target, rows=2, length=300)
    convolutions = [call for call in found if call.operation == "short_convolution"]
    expected = heads.get(target, []) if mixer == "rg_lru" else heads
    assert [call.options.get("head_width") for call in convolutions] == expected


def test_the_kernel_of_a_convolution_is_checked():
    shapes = {"x": (1, 100, 12), "kernel": (4, 12), "bias": (12,), "segment_ids": (1, 100)}
    dtypes = {"segment_ids": jnp.int32}
    arrays = {name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.float32)) for name, shape in shapes.items()}
    call = Call("short_convolution", (*arrays.items(), ("head_width", 3)))
    assert check_inputs.constants(call) == {"kernel", "bias"}
    found = checked(call)
    assert found.is_right and max(error.kernel for error in found.errors) < 1e-5
    gradients = {f"gradient of {name}" for name in ("x", "kernel", "bias", "initial_state")}
    assert arrays_of(found) == {"output", "last state", *gradients}


def test_a_model_without_kernels_on_the_device(monkeypatch):
    """It is reported once, with the reason, and nothing is wrong."""
    monkeypatch.setattr(backends, "no_kernels", lambda *shapes: "the kernels for GPU run on NVIDIA GPUs only")
    found = check("hawk_6m", 150, recurrent_width=32)
    assert [device_check_text.line(x) for x in found] == [
        f"{operation:25} weak    no kernel: {operation}: the kernels for GPU run on NVIDIA GPUs only; use backend={other!r}"
        for operation, other in (("rg_lru_gates", "products"), ("linear_recurrence", "associative"))
    ]
    assert found[0].is_right
    assert device_check_text.verdict(found) == "no operation of this model is a kernel on this device"


def test_too_few_tokens():
    with pytest.raises(UserError, match=r"^50 tokens are too few to check kernels; use 74 or more$"):
        check("hawk_6m", 50)


def test_lines():
    error = Error("gradient of q", 0.0123, 0.0045, 0.0235)
    checked = Checked("linear_attention", {}, "weak", errors=(Error("output", 0.001, 0.001, 0.013), error))
    columns = "linear_attention          weak    gradient of q              1.2e-02  4.5e-03"
    assert device_check_text.line(checked) == columns
    timed = Checked("linear_attention", {}, "weak", errors=(error,), milliseconds=(1.5, 12.25))
    assert device_check_text.line(timed) == columns + "      1.500     12.250"
    assert len(device_check_text.HEADER) == len(columns) + 22


def test_the_program(start, tmp_path):
    """Without a device, the program refuses; interpreted, it ends with a verdict and status 0."""
    model = ["preset=hawk_6m", "num_layers=1", "width=32", "recurrent_width=32", "num_heads=2"]
    arguments = ["--config=configs/griffin_100m.py", *(f"--config.model.{value}" for value in model)]
    refused = start("check", *arguments)
    said = "check.py: this machine has no TPU or GPU, only cpu; --interpret checks kernels without one\n"
    assert (refused.returncode, refused.stderr) == (2, said)
    output = tmp_path / "check.json"
    done = tiny.run("launch/check.py", *arguments, "--interpret", "--length=74", "--rows=1", f"--json={output}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "right on this device: the kernels of rg_lru_gates, linear_recurrence"
    result = json.loads(output.read_text())
    assert result["device"] == "cpu" and [x["inputs"] for x in result["checked"]] == [*check_inputs.KINDS] * 2


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("topology", ["h100:1", pytest.param("v5e:1x1", marks=pytest.mark.slow)])
def test_what_runs_on_a_device_compiles_for_it(topology):
    """With a kernel and without, at the sizes of GLA 1.3B."""
    device, without = targets.find(topology).devices[0], {"linear_attention": "chunked", "gated_rms_norm": "separate"}
    found, place = calls(config("gla_1b3"), topology, length=256), SingleDeviceSharding(device)
    assert [call.operation for call in found] == list(without)
    with backends.use_device(device):
        for call, backend in itertools.product(found, ("pallas", "without")):
            backend = without[call.operation] if backend == "without" else backend
            run = device_check.outputs_of(call, backend)
            arguments = call.arrays, jax.eval_shape(run, call.arrays)
            arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
            lowered = jax.jit(device_check.with_gradients(run)).lower(*arguments)
            text = lowered.compile(compiler_options=compiler.WITHOUT_DEVICE.get(device.platform)).as_text()
            assert (f"{call.operation}_gradient" in text) == (backend == "pallas")
