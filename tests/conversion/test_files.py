"""Damaged files, full disks, and how much of a file is in memory at once."""

import json
import os
import shutil
import socket

import numpy as np
import pytest

from jaxlinear import config as configs
from jaxlinear import locks, streaming
from jaxlinear.checkpoint import Checkpoints
from jaxlinear.conversion import convert, export_weights, flax, hugging_face, import_weights, safetensors
from jaxlinear.errors import UserError
from jaxlinear.streaming import StreamedArray
from jaxlinear.training import workdir as workdirs
from tests.conversion import converted
from tests.conversion.converted import arrays, assert_nothing_in, assert_same_bits, refused, rewrite, write_header

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def of_x(entry):
    """Writes a file with one tensor, x, of that entry."""
    return lambda path: write_header(path, {"x": entry}, b"0000")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(b"short"), "is not a safetensors file, or is truncated"),
        (lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"), "not a safetensors file, or is trunc"),
        (lambda path: path.write_bytes((4).to_bytes(8, "little") + b"none"), "its header is not JSON"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "is not where the header says; .* truncated"),
        (lambda path: write_header(path, [1]), "is not a safetensors file: its header is not an object"),
        *((of_x(ENTRY | {"shape": [size]}), "the entry of x is damaged") for size in ("1", -1, True)),
        *(
            (of_x(ENTRY | {"data_offsets": offsets}), "the entry of x is damaged")
            for offsets in (["0", "4"], [0.0, 4.0], [-4, 0])
        ),
        *((of_x(entry), "the entry of x is damaged") for entry in ({"dtype": "F32"}, ENTRY | {"dtype": []})),
        (of_x({"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}), "the dtype I8; weights .* from F32, F16, BF16"),
    ],
)
def test_damaged_files(copied, tmp_path, damage, message):
    source = copied("llama")
    damage(source / "model.safetensors")
    refused(f"model.safetensors.*{message}", source, tmp_path / "run")
    assert_nothing_in(tmp_path, "source")


def test_an_embedding_that_is_there_twice(copied, tmp_path):
    """Some files of tied models also hold the head, which must be equal."""
    source = copied("mamba2")
    rewrite(source, lambda x: x | {"lm_head.weight": x["backbone.embeddings.weight"]})
    import_weights(source, tmp_path / "run")
    rewrite(source, lambda x: x | {"lm_head.weight": x["backbone.embeddings.weight"] + 1})
    refused("lm_head.weight differs from backbone.embeddings.weight, although", source, tmp_path / "other")
    # An older name, and an entry that is not a weight.
    rewrite(source, lambda x: {name: y for name, y in x.items() if name != "lm_head.weight"})
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    rewrite(source, lambda x: {name.replace("embeddings", "embedding"): y for name, y in x.items()} | frequencies)
    import_weights(source, tmp_path / "old")
    assert_same_bits(arrays(tmp_path / "old"), arrays(tmp_path / "run"))


def test_what_is_no_model(tmp_path):
    source, run = tmp_path / "empty", tmp_path / "run"
    source.mkdir()
    refused("empty is neither a Hugging Face directory .* nor a recurrentgemma", source, run)
    refused("nowhere is not a directory", tmp_path / "nowhere", run)
    (source / "model.safetensors").touch()
    refused("empty has no config.json", source, run)
    (source / "config.json").write_text("[]")
    refused("config.json is damaged: it is not an object", source, run)
    with pytest.raises(UserError, match=r"empty already exists; name a new or empty directory"):
        import_weights(source, source)
    with pytest.raises(UserError, match=r"nowhere is not the work directory of a run: it has no config.json"):
        export_weights(tmp_path / "nowhere", tmp_path / "target")
    assert_nothing_in(tmp_path, "empty")


def test_nothing_is_left_of_what_failed(made, tmp_path, monkeypatch):
    """Nor of earlier attempts that were killed."""
    source, exported = made("llama")
    for name in ("run", "target"):
        left = tmp_path / f".{name}.partial-0123abcd"
        (left / "whole").mkdir(parents=True)
        (left / "whole" / "config.json").touch()
        (left / locks.FILE).write_text(socket.gethostname())
    write = streaming._Handler.serialize

    async def fail(*arguments):
        await write(*arguments)
        raise OSError("the disk went away")

    monkeypatch.setattr(streaming._Handler, "serialize", fail)
    with pytest.raises(OSError, match="the disk went away"):
        import_weights(exported, tmp_path / "run")
    monkeypatch.setattr(hugging_face, "write", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        export_weights(source, tmp_path / "target")
    assert_nothing_in(tmp_path)


def test_two_at_once_do_not_write_into_one(tmp_path):
    """Files that the first had not yet written used to land among those of the second, under the same names."""
    with pytest.raises(UserError, match=r"run already exists"), convert._made_whole(tmp_path / "run", {}) as first:
        first.mkdir()
        with convert._made_whole(tmp_path / "run", {}) as second:
            second.mkdir()
            (second / "weights").write_text("of the second")
            (first / "weights").write_text("of the first")
    assert (tmp_path / "run" / "weights").read_text() == "of the second"
    assert_nothing_in(tmp_path, "run")


def test_a_full_disk(made, tmp_path, monkeypatch):
    source, exported = made("llama")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        with pytest.raises(UserError, match=r"no space left on the disk for .*run: it needs up to [\d.]+ MB and 0.1"):
            import_weights(exported, tmp_path / "run")

    def fail(*_):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(hugging_face, "write", fail)
    with pytest.raises(UserError, match=r"no space left on the disk for .*target: it was used up by other data during"):
        export_weights(source, tmp_path / "target")
    assert_nothing_in(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="not Linux")
def test_where_nothing_can_be_made_the_disk_is_not_called_full(made):
    """Such a file system has no free space either."""
    with pytest.raises(UserError, match=r"^/proc/\.run\.partial-\w+ cannot be made: its file system takes no new dir"):
        import_weights(made("llama")[1], "/proc/run")


def test_a_damaged_checkpoint_is_not_exported(made, tmp_path):
    workdir = shutil.copytree(made("llama")[0], tmp_path / "run")
    largest = max((workdir / "checkpoints" / "7" / "parameters").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match=r"the checkpoint .*/7 cannot be read"):
        export_weights(workdir, tmp_path / "target")
    assert_nothing_in(tmp_path, "run")


def watched(arrays, read):
    """The same arrays, which note in ``read`` what is read of them: name and bytes."""

    def one(name, x):
        def read_rows(begin, end):
            rows = x.read(begin, end)
            read.append((name, rows.nbytes))
            return rows

        return StreamedArray(x.shape, x.dtype, x.rows, read_rows, x.order)

    return {name: one(name, x) for name, x in arrays.items()}


@pytest.mark.parametrize("name", ["flax", "mamba2"])
def test_what_is_read_at_once(made, tmp_path, monkeypatch, name):
    """At most one layer's tensor or, for an array that can be cut anywhere, a few rows; and nothing is read twice except
    for checksums. The pieces make up the whole file."""
    monkeypatch.setattr(streaming, "PIECE_BYTES", 1000)
    read, (source, exported), layout = [], made(name), converted.layout(name)
    layouts = flax if layout == "flax" else hugging_face
    read_tensors = layouts.read_tensors
    monkeypatch.setattr(layouts, "read_tensors", lambda directory: watched(read_tensors(directory), read))
    import_weights(exported, tmp_path / "run")
    sizes = {tensor: x.nbytes for tensor, x in read_tensors(exported).items()}
    embedding = next(tensor for tensor in sizes if "embed" in tensor)
    assert max(size for tensor, size in read if tensor == embedding) <= 1000 < sizes[embedding]
    assert sum(size for _, size in read) == 2 * sum(sizes.values())
    assert all(size <= sizes[tensor] for tensor, size in read)

    read.clear()
    stream = Checkpoints.stream
    monkeypatch.setattr(Checkpoints, "stream", lambda *arguments: watched(stream(*arguments), read))
    export_weights(tmp_path / "run", tmp_path / "again", layout=layout)
    stacked = {path: x.nbytes for path, x in stream(Checkpoints(tmp_path / "run"), "parameters").items()}
    assert sum(size for _, size in read) == sum(stacked.values())
    stacks = configs.model_config(workdirs.read_config(source)).stacks
    of_layers = [(path, size, stacks[int(path.split(".")[1])]) for path, size in read if path.startswith("stacks.")]
    assert len(of_layers) < len(read) and all(size <= stacked[path] / x.repeats for path, size, x in of_layers)
    assert all(size <= stacked[path] for path, size in read)
    assert_same_bits(arrays(tmp_path / "run"), arrays(source))
    assert_same_bits(converted.tensors(tmp_path / "again"), converted.tensors(exported))


def test_a_checkpoint_of_training_is_read_once(made, tmp_path, monkeypatch):
    """Even though each of its arrays is one piece that holds the tensors of many layers."""
    stream = Checkpoints.stream
    for name in ("recurrent_gemma", "flax", "mamba2"):
        read, source = [], made(name)[0]
        monkeypatch.setattr(Checkpoints, "stream", lambda *arguments, read=read: watched(stream(*arguments), read))
        export_weights(source, tmp_path / name, layout=converted.layout(name))
        assert len(read) == len({path for path, _ in read}) > 10


def test_safetensors_header():
    x = converted.streamed(np.zeros((2, 3), np.float32))
    header, places = safetensors.header({"a": x, "b": x})
    length = int.from_bytes(header[:8], "little")
    entries = json.loads(header[8:])
    assert len(header) == 8 + length and length % 8 == 0
    assert entries["b"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 48]}
    assert places == {"a": len(header), "b": len(header) + 24}
