"""Compiling rows.c: what is kept, what is not trusted, and what is said where there is no C."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mossrlhf.kernels import backend, c_library, c_rows, dispatch

HERE = Path(c_library.__file__)
HASTY = tuple(flag.replace("-O3", "-O1") for flag in c_library.FLAGS)
"""Flags of a compiler that need not take long."""


def forget():
    for cached in (c_library.load, c_rows.why_not, dispatch._chosen):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache, and nothing decided; nor afterwards."""
    monkeypatch.setattr(c_library, "FLAGS", HASTY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(c_library.SWITCH, raising=False)
    forget()
    yield tmp_path / "cache" / "mossrlhf"
    monkeypatch.undo()
    forget()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with what the compiler makes."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(folder))
        patched.setattr(c_library, "FLAGS", HASTY)
        c_library.load.__wrapped__()
    return folder / "mossrlhf"


@pytest.fixture
def compiler(request, cache, made):
    """There is one, and the cache has what it made; nothing is decided."""
    if made.exists():
        shutil.copytree(made, cache)
    request.getfixturevalue("c_is_there")
    forget()


@pytest.fixture
def instead(monkeypatch, tmp_path):
    """Puts a shell script in the place of the compiler."""

    def put(*lines):
        folder = tmp_path / "bin"
        folder.mkdir()
        script = folder / "cc"
        script.write_text("\n".join(["#!/bin/sh", 'test "$1" = --version && exit 0', *lines, ""]))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return put


def works(library) -> bool:
    return isinstance(library, ctypes.CDLL) and c_rows._wrong(library) is None


class TestWithout:
    def said(self) -> str:
        """Why there is no C, as a user reads it."""
        found = backend("cpu")
        assert found.name == "torch"
        assert found.reason.startswith("the device is 'cpu', and ")
        return found.reason.removeprefix("the device is 'cpu', and ")

    def test_compiler(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert self.said() == "there is no C compiler (cc, gcc, clang)"

    @pytest.mark.parametrize("value", ["1", "yes"])
    def test_being_wanted(self, monkeypatch, value):
        monkeypatch.setenv("MOSSRLHF_NO_COMPILER", value)
        assert self.said() == "MOSSRLHF_NO_COMPILER is set"

    @pytest.mark.parametrize("value", ["", "0"])
    def test_being_unwanted(self, compiler, monkeypatch, value):
        monkeypatch.setenv("MOSSRLHF_NO_COMPILER", value)
        assert backend("cpu").name == "c"

    def test_success(self, instead):
        instead(
            "echo rows.c: In function >&2",
            f"echo '{HERE.parent}/rows.c:1: error: no' >&2",
            "exit 1",
        )
        assert self.said() == "the C compiler failed (rows.c:1: error: no)"

    def test_success_and_words(self, instead):
        instead("exit 1")
        assert self.said() == "the C compiler failed (it said nothing)"

    def test_patience(self, instead, monkeypatch):
        monkeypatch.setattr(c_library, "SECONDS", 0.2)
        instead("exec sleep 30")
        assert self.said() == "the C compiler took more than 0.2 seconds"

    def test_result(self, instead):
        instead("exit 0")
        assert (
            self.said() == "rows.c cannot be compiled and loaded here (No such file or directory)"
        )

    def test_library(self, instead):
        instead('while test "$1" != -o; do shift; done', 'echo junk >"$2"')
        said = self.said()
        assert said.startswith("rows.c cannot be compiled and loaded here (")
        assert "rows.so" in said or ".so:" in said  # the loader's own words

    def test_functions(self, compiler, monkeypatch, tmp_path):
        empty = tmp_path / "rows.c"
        empty.write_text("int nothing;\n")
        monkeypatch.setattr(c_library, "SOURCE", empty)
        assert self.said().startswith("what the C compiler made cannot be called (")

    def test_the_system(self, monkeypatch):
        monkeypatch.setattr(c_library.os, "name", "nt")
        assert self.said().startswith("C is not compiled on ")

    def test_c_cannot_be_forced(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RuntimeError, match="not computed in C here, since there is no C"):
            c_rows._library()


FAULTS = {
    "sum": ("d += e;", "d += e + 1e-3f;"),
    "entropy": ("weighted += e * x;", "weighted -= e * x;"),
    "reference": ("cross += e == 0.0f ? 0.0f : e * r;", "cross += e == 0.0f ? 0.0f : e * x;"),
    "infinity": ("return x < LEAST ? LEAST : x;", "return x;"),
    "temperature": ("(z[i] - s.m) / s.t", "(z[i] - s.m) * s.t"),
    "softcap": ("1.0f - z[i] * z[i] * s.cap", "1.0f + z[i] * z[i] * s.cap"),
    "label": ("to[label - start] += at_label", "to[label - start] -= at_label"),
    "bfloat16": ("(uint32_t)half[i] << 16", "(uint32_t)half[i] << 15"),
    "rounding": ("(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "(bits >> 16) + 2"),
    "ignored": ("if (w->ids[row] >= 0) stats_of_row", "stats_of_row"),
    "order": ("logits_stride, ref_stride, out_stride;", "ref_stride, logits_stride, out_stride;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_library_is_not_used(compiler, monkeypatch, tmp_path, fault):
    right, wrong = FAULTS[fault]
    source = c_library.SOURCE.read_text(encoding="utf-8")
    assert source.count(right) >= 1
    changed = tmp_path / "rows.c"
    changed.write_text(source.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(c_library, "SOURCE", changed)
    found = backend("cpu")
    assert found.name == "torch"
    assert "what the C compiler made computes other numbers than torch, of torch." in found.reason
    with pytest.raises(RuntimeError, match="computes other numbers than torch"):
        c_rows._library()


class TestCache:
    def test_is_the_users_alone(self, compiler, cache):
        shutil.rmtree(cache)
        assert works(c_library.load())
        assert cache.stat().st_mode & 0o777 == 0o700
        (kept,) = cache.iterdir()
        assert kept.suffix == ".so"

    def test_is_read(self, compiler, monkeypatch):
        monkeypatch.setattr(c_library, "_compile", lambda *_: pytest.fail("compiled again"))
        assert works(c_library.load())

    def test_is_in_the_home_where_nothing_is_said(self, compiler, monkeypatch, tmp_path):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert works(c_library.load())
        assert len(list((tmp_path / ".cache" / "mossrlhf").iterdir())) == 1

    @pytest.mark.parametrize("what", ["_cpu", "FLAGS", "SOURCE", "compiler"])
    def test_is_of_what_it_was_made_from(self, compiler, cache, monkeypatch, tmp_path, what):
        if what == "_cpu":
            monkeypatch.setattr(c_library, "_cpu", lambda: "another")
        elif what == "FLAGS":
            monkeypatch.setattr(c_library, "FLAGS", (*c_library.FLAGS, "-DBLOCK=64"))
        elif what == "SOURCE":
            changed = tmp_path / "rows.c"
            changed.write_text(c_library.SOURCE.read_text(encoding="utf-8") + "/* more */\n")
            monkeypatch.setattr(c_library, "SOURCE", changed)
        else:
            run = c_library._run
            monkeypatch.setattr(
                c_library, "_run", lambda c: "99" if c[1] == "--version" else run(c)
            )
        assert works(c_library.load())
        assert len(list(cache.iterdir())) == 2

    def test_the_cpu_has_a_name_that_stays(self):
        if not Path("/proc/cpuinfo").exists():
            pytest.skip("the system keeps no /proc/cpuinfo")
        said = c_library._cpu()
        assert "flags" in said or "Features" in said
        assert said == c_library._cpu()

    def test_the_machine_has_a_name_where_the_cpu_has_none(self, monkeypatch):
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: exec("raise OSError"))
        assert c_library.platform.node() in c_library._cpu()

    @pytest.mark.parametrize("content", [b"", b"junk", None])
    def test_damaged(self, compiler, cache, content):
        """Half a file, mapped, would end the process."""
        (kept,) = cache.iterdir()
        whole = kept.read_bytes()
        damaged = cache / "damaged"
        damaged.write_bytes(whole[: len(whole) // 2] if content is None else content)
        damaged.replace(kept)
        assert works(c_library.load())
        assert [path.read_bytes() for path in cache.iterdir()] == [whole]

    def test_of_other_users_is_left_alone(self, compiler, cache, monkeypatch):
        uid = os.getuid()
        monkeypatch.setattr(c_library.os, "getuid", lambda: uid + 1)
        self.stays_out(cache, monkeypatch)

    @pytest.mark.parametrize("mode", [0o770, 0o702])
    def test_where_others_write_is_left_alone(self, compiler, cache, monkeypatch, mode):
        cache.chmod(mode)
        self.stays_out(cache, monkeypatch)

    def stays_out(self, cache, monkeypatch):
        before = [(path, path.stat().st_mtime_ns) for path in cache.iterdir()]
        loaded = []
        real = ctypes.CDLL
        monkeypatch.setattr(
            c_library.ctypes, "CDLL", lambda path: loaded.append(path) or real(path)
        )
        library = c_library.load.__wrapped__()
        monkeypatch.undo()
        assert works(library)
        assert not loaded[0].startswith(str(cache))
        assert [(path, path.stat().st_mtime_ns) for path in cache.iterdir()] == before

    @pytest.mark.parametrize("why", ["a file", "no home"])
    def test_that_cannot_be_written(self, compiler, monkeypatch, tmp_path, why):
        """Compiled for this process, and nothing stays."""
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        (tmp_path / "file").touch()
        monkeypatch.setattr(c_library.tempfile, "tempdir", str(scratch))
        if why == "a file":
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        else:
            monkeypatch.setattr(Path, "expanduser", lambda _: exec("raise RuntimeError"))
        assert works(c_library.load())
        assert list(scratch.iterdir()) == []


def test_processes_that_compile_at_once(compiler, tmp_path):
    """Each loads a whole library, and one is kept."""
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('c_library', {str(HERE)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.load().mossrlhf_stats.__name__)\n"
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "together")}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0] for process in running] == ["mossrlhf_stats\n"] * 3
    kept = list((tmp_path / "together" / "mossrlhf").iterdir())
    assert all(c_library._is_whole(path) for path in kept)
    assert len(kept) == 1
