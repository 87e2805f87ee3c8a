"""Building the native kernels: once, for one user, whole or not at all, and a clear word where it cannot be."""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hypermlp.ops import attention, native
from hypermlp_kernels.native import build
from hypermlp_kernels.native.build import UnavailableError
from tests.helpers import make_case

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the kernels are built on Linux and macOS")

_FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "fake {version}"; exit 0; fi
echo call >> "{log}"
{then}
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and nothing remembered from before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hypermlp" / "native"


@pytest.fixture
def forgotten():
    """What has been built or refused in this process is asked anew, before and after."""
    remembered = (build.library, build._load_or_reason, native._why_not_built, attention._say_once)
    for f in remembered:
        f.cache_clear()
    yield
    for f in remembered:
        f.cache_clear()


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str = "", version: str = "1") -> Path:
    """A compiler that writes a file and keeps a log of its calls."""
    path, log = tmp_path / "fake-c++", tmp_path / "log"
    path.write_text(_FAKE.format(log=log, then=then, version=version))
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    log.touch()
    return log


def calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_it_is_built_once_and_again_where_something_differs(cache, tmp_path, monkeypatch):
    log = compiler(tmp_path, monkeypatch)
    first = build.build(torch.float32)
    assert build.build(torch.float32) == first
    assert calls(log) == 1
    assert build.build(torch.float64) != first, "another precision"
    compiler(tmp_path, monkeypatch, version="2")
    assert build.build(torch.float32) != first, "another compiler"
    monkeypatch.setattr(build, "_machine_flags", lambda: ("-mother",))
    assert build.build(torch.float32) != first, "another CPU"
    source = tmp_path / "sources"
    shutil.copytree(build._SOURCES, source)
    (source / "gemm.h").write_text("// changed")
    other = build.build(torch.float32)
    monkeypatch.setattr(build, "_SOURCES", source)
    assert build.build(torch.float32) != other, "other sources"
    assert calls(log) == 5


def test_it_is_private_to_the_user(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    old = os.umask(0)
    try:
        made = build.build(torch.float32)
    finally:
        os.umask(old)
    for path in (made.parent.parent, made.parent, made):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


@pytest.mark.parametrize("where", ["hypermlp", "native"])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_to_is_refused(cache, tmp_path, monkeypatch, where, mode):
    log = compiler(tmp_path, monkeypatch)
    cache.mkdir(parents=True, mode=0o700)
    folder = cache if where == "native" else cache.parent
    folder.chmod(mode)
    with pytest.raises(UnavailableError, match=f"others can write to {folder}.*chmod go-w"):
        build.build(torch.float32)
    assert calls(log) == 0


def test_a_library_that_others_can_write_to_is_not_loaded(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    made = build.build(torch.float32)
    made.chmod(0o777)
    with pytest.raises(UnavailableError, match="others can write"):
        build._load(made)


def test_a_link_in_place_of_the_folder_is_refused(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    cache.parent.mkdir(parents=True, mode=0o700)
    (tmp_path / "elsewhere").mkdir()
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnavailableError, match="is a link"):
        build.build(torch.float32)


def test_another_users_folder_is_refused(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    build.build(torch.float32)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UnavailableError, match="belongs to another user"):
        build.build(torch.float32)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UnavailableError, match=r"there is no cache folder.*set XDG_CACHE_HOME"):
        build.build(torch.float32)


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_named(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch)
    cache.mkdir(parents=True, mode=0o700)
    cache.chmod(0o500)
    with pytest.raises(UnavailableError, match="cannot be written"):
        build.build(torch.float32)


def test_a_compiler_that_fails_says_why_and_leaves_nothing(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, then='echo "gemm.h:1: error: no such thing" >&2; exit 3')
    with pytest.raises(UnavailableError, match=r"failed \(3\): gemm.h:1: error: no such thing"):
        build.build(torch.float32)
    assert {path.name for path in cache.iterdir()} <= {"lock"}


def test_a_broken_library_is_a_reason_and_no_crash(cache, tmp_path, monkeypatch, forgotten):
    compiler(tmp_path, monkeypatch)
    with pytest.raises(UnavailableError, match="cannot be loaded"):
        build.library(torch.float32)


def test_what_was_built_ahead_is_found_without_a_compiler(cache, tmp_path, monkeypatch):
    log = compiler(tmp_path, monkeypatch)
    made = build.build(torch.float32)
    monkeypatch.setenv("CXX", str(tmp_path / "nothing-here"))
    assert build.build(torch.float32) == made
    with pytest.raises(UnavailableError, match="there is no C\\+\\+ compiler"):
        build.build(torch.float64)
    assert calls(log) == 1


def test_many_processes_at_once_build_it_once(cache, tmp_path, monkeypatch):
    log = compiler(tmp_path, monkeypatch, then="sleep 1")
    program = "import torch; from hypermlp_kernels.native.build import build; print(build(torch.float32))"
    started = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment())
        for _ in range(2)
    ]
    found = {process.communicate(timeout=120)[0] for process in started}
    assert len(found) == 1
    assert calls(log) == 1


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_the_command_builds_and_says_where(cache, tmp_path, monkeypatch, forgotten):
    compiler(tmp_path, monkeypatch)
    command = [sys.executable, "-m", "hypermlp_kernels.native", "build"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert Path(done.stdout.strip()).parent == cache
    monkeypatch.setenv("CXX", str(tmp_path / "nothing-here"))
    shutil.rmtree(cache)
    monkeypatch.setattr(sys, "argv", command[2:])
    with pytest.raises(SystemExit, match="not built: there is no C\\+\\+ compiler"):
        runpy.run_module("hypermlp_kernels.native", run_name="__main__")


def test_without_a_compiler_auto_takes_chunked_and_says_so_once(cache, tmp_path, monkeypatch, forgotten, caplog):
    monkeypatch.setenv("CXX", str(tmp_path / "nothing-here"))
    caplog.set_level(logging.INFO, logger="hypermlp")
    case = make_case(dtype=torch.float32)
    for _ in range(2):
        assert torch.equal(case.run("auto"), case.run("chunked"))
    messages = [record.getMessage() for record in caplog.records]
    assert sum("there is no C++ compiler" in message for message in messages) == 1
    assert sum("takes the chunked path" in message for message in messages) == 1
    with pytest.raises(ValueError, match="backend='native' cannot run here: there is no C\\+\\+ compiler"):
        case.run("native")


@pytest.mark.usefixtures("native_path")
def test_with_one_auto_takes_native_for_all_but_float64():
    case = make_case(dtype=torch.float32, length=40)
    assert torch.equal(case.run("auto"), case.run("native"))
    assert not torch.equal(case.run("native"), case.run("chunked")), "the test cannot tell them apart"
    wide = case.map(lambda x: x.double())
    assert torch.equal(wide.run("auto"), wide.run("chunked"))


def test_an_exported_program_runs_without_a_compiler(cache, tmp_path, monkeypatch, forgotten):
    """Where it was exported there was one: the operator then takes the chunked path."""
    from tests.ops.test_library import forward_args

    monkeypatch.setenv("CXX", str(tmp_path / "nothing-here"))
    case = make_case(dtype=torch.float32).map(lambda x: x.requires_grad_())
    o = torch.ops.hypermlp.native_forward(*forward_args(case))[0]
    grads = torch.autograd.grad(o.sum(), case.tensors["k"])
    assert torch.equal(o, case.run("chunked"))
    assert torch.equal(grads[0], torch.autograd.grad(case.run("chunked").sum(), case.tensors["k"])[0])
