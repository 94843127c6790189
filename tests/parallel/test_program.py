"""What distinguishes the program of one process from another's."""

import jax
import pytest

from jaxlinear.parallel import distributed, program


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two files in place of the library."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "__init__.py").write_text("one = 1\n")
    (tmp_path / "inside" / "other.py").write_text("two = 2\n")
    monkeypatch.setattr(program.jaxlinear, "__file__", str(tmp_path / "__init__.py"))
    return tmp_path


def test_another_line_of_code_is_another_program(package):
    before = program.text()
    (package / "notes.txt").write_text("no code")
    assert program.text() == before
    (package / "inside" / "other.py").write_text("two = 3\n")
    assert program.text() != before
    (package / "inside" / "other.py").write_text("two = 2\n")
    assert program.text() == before
    (package / "inside" / "other.py").rename(package / "inside" / "renamed.py")
    assert program.text() != before


@pytest.mark.parametrize("name", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
@pytest.mark.parametrize(
    "flags, same",
    [
        ("--xla_dump_to=/tmp/host3", True),
        ("--xla_dump_hlo_as_text", True),
        ("--xla_force_host_platform_device_count=4", True),
        ("--xla_gpu_per_fusion_autotune_cache_dir=/tmp/host3", True),
        ("--xla_allow_excess_precision=false", False),
        ("--xla_dump_to=/tmp --xla_backend_optimization_level=0", False),
    ],
)
def test_flags_that_hosts_may_have_of_their_own(monkeypatch, name, flags, same):
    monkeypatch.delenv(name, raising=False)
    before = program.text()
    monkeypatch.setenv(name, flags)
    assert (program.text() == before) == same


def test_versions_and_settings_that_change_results_are_told_apart(monkeypatch):
    before, version = program.text(), program.importlib.metadata.version
    for setting in (jax.default_matmul_precision("highest"), jax.enable_x64(True)):
        with setting:
            assert program.text() != before
    other = lambda name: "9.9" if name == "jaxlib" else version(name)  # noqa: E731
    monkeypatch.setattr(program.importlib.metadata, "version", other)
    assert program.text() != before and "jaxlib 9.9" in program.text()


def test_of_one_process_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(program, "text", lambda: pytest.fail("alone there is no one to differ from"))
    distributed.check_same_program()
