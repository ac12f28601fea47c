"""`rows.c`, compiled for this very CPU at first use and kept in the user's cache.

The file's name has what it was made from (sources, flags, compiler, CPU) and a hash of what is in
it: another CPU compiles its own, and a damaged file is made again. It is written aside and renamed,
so processes that compile at the same time do not see each other's halves.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("rows.c")

FLAGS = (
    *("-std=c99", "-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC"),
    # Multiplications and additions in one, and no care for flags that nobody reads. What would
    # forget NaN or infinity, or sum in another order than is written, is left out.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)

COMPILERS = ("cc", "gcc", "clang")
SECONDS = 60
"""After which a compiler is given up."""

SWITCH = "MOSSRLHF_NO_COMPILER"
"""Environment variable that leaves rows to torch, where it is set to anything but 0."""


@cache
def load() -> ctypes.CDLL | str:
    """Return the library, compiled or from the cache; or why there is none, as a clause.

    Source: ours.
    """
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        return f"{SWITCH} is set"
    if os.name != "posix":
        return f"C is not compiled on {platform.system()}"
    found = [path for name in COMPILERS if (path := shutil.which(name))]
    if not found:
        return f"there is no C compiler ({', '.join(COMPILERS)})"
    try:
        return _built(found[0])
    except subprocess.TimeoutExpired:
        return f"the C compiler took more than {SECONDS} seconds"
    except subprocess.CalledProcessError as error:
        return f"the C compiler failed ({_complaint(error.stderr or '')})"
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        return f"rows.c cannot be compiled and loaded here ({why})"


def _built(compiler: str) -> ctypes.CDLL:
    """Load what is in the cache, else compile: into the cache, or where none may be kept."""
    key = _key(compiler)
    try:
        folder = _cache_folder()
        kept = [path for path in folder.glob(f"{key}-*.so") if _is_whole(path)]
        return ctypes.CDLL(str(kept[0] if kept else _compile(compiler, folder, key)))
    except (
        OSError,
        RuntimeError,
    ):  # no home, nothing there to read or to write, or nothing that can be loaded
        with tempfile.TemporaryDirectory(prefix="mossrlhf-", ignore_cleanup_errors=True) as own:
            return ctypes.CDLL(str(_compile(compiler, Path(own), key)))


def _cache_folder() -> Path:
    """Return a folder that nobody else may write to.

    Raises:
        PermissionError: where it is somebody else's, or others may write to it.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = base / "mossrlhf"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder}: others may write here, so nothing is loaded from it")
    return folder


def _key(compiler: str) -> str:
    """Hash everything that the result depends on."""
    version = _run([compiler, "--version"])
    parts = [SOURCE.read_text(encoding="utf-8"), *FLAGS, compiler, version, _cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cpu() -> str:
    """Return what a CPU is and can do; where the system does not say, the machine's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        lines = [platform.node()]
    changing = (
        "cpu MHz",
        "bogomips",
        "BogoMIPS",
        "processor",
        "core id",
        "apicid",
        "initial apicid",
    )
    said = [line for line in lines if not line.startswith(changing)]
    return "\n".join([platform.machine(), platform.processor(), *said])


def _compile(compiler: str, folder: Path, key: str) -> Path:
    """Compile into a folder: aside, and renamed when it is whole."""
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as aside:
        made = Path(aside) / "rows.so"
        _run([compiler, *FLAGS, str(SOURCE), "-o", str(made), "-lm"])
        return made.replace(folder / f"{key}-{_digest(made)}.so")


def _is_whole(path: Path) -> bool:
    """Whether a file has in it what its name says; mapped by the loader, half of one would kill."""
    return path.stem.endswith(_digest(path))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _run(command: list[str]) -> str:
    """Run a compiler, in plain English, and return what it says."""
    done = subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=SECONDS,
        check=True,
    )
    return done.stdout


def _complaint(said: str) -> str:
    """Return the line of a compiler's that says most, without the file it is about."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line] or lines or ["it said nothing"]
    return errors[0].replace(str(SOURCE), SOURCE.name)[:200]
