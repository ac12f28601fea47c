"""What every test runs under: checked shapes, one thread, no network."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import hypothesis
import jaxtyping
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed prints that it has found nothing else

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src"

# Before the first import of the package: where annotations have shapes, they are checked from here
# on. Elsewhere it would cost a third of the suite's time, and find what mypy finds.
SHAPED = [
    ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(SOURCES.rglob("*.py"))
    if "jaxtyping" in path.read_text(encoding="utf-8")
]
# And the decorator that rejects unknown options, or the hook would check those before it does.
jaxtyping.install_import_hook([*SHAPED, "mossrlhf.options"], "shapecheck.checker")

torch.set_num_threads(1)  # the workers share the cores; small tensors gain nothing from more

# After the hook: it imports the package.
from tiny_trainer import build, make, parameters, policy, reward_model, world  # noqa: E402, F401

# The same examples on every run and machine, however slow; nothing kept in between.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture
def script(root, monkeypatch) -> Callable[[str], ModuleType]:
    """Loads a file of examples/ or benchmarks/ as a module."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, root / path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look names up
        monkeypatch.syspath_prepend((root / path).parent)  # as Python does for a script
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The folder that the test runs in from here on: tiny models lie there under real names."""
    from snippets import save_stand_ins  # not before the annotations are checked

    monkeypatch.chdir(tmp_path)  # what a page writes does not land in the repository either
    save_stand_ins(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of sample data beside the checkout; where there is none, the test is skipped."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder ../shared with sample data beside the checkout")
    return folder
