"""The package as a whole: what importing it costs and needs, and what it promises."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jaxtyping
import pytest
import torch

import mossrlhf
from mossrlhf.functional import clipped_policy_loss

OPTIONAL = ("triton", "datasets", "matplotlib", "deepspeed", "vllm")


def run_python(code: str, root: Path) -> str:
    """Run `code` in a fresh interpreter, without the tests' import hook; return its output."""
    code = f"import sys; sys.path.insert(0, {str(root / 'src')!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick(root):
    code = """
import time, torch, transformers
start = time.perf_counter()
import mossrlhf
print(time.perf_counter() - start)
"""
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1.0) >= 1.0:  # a busy machine may spoil one
        seconds.append(float(run_python(code, root)))
    assert min(seconds) < 1.0


def test_every_name_without_the_optional_packages(root):
    code = f"""
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # importing it raises ImportError from here on
import mossrlhf
for name in mossrlhf.__all__:
    getattr(mossrlhf, name)
print(len(mossrlhf.__all__))
"""
    assert int(run_python(code, root)) == len(mossrlhf.__all__) > 0


def test_import_is_lazy(root):
    code = """
import mossrlhf
print(sorted({"accelerate", "datasets", "matplotlib", "peft", "transformers"} & set(sys.modules)))
"""
    assert run_python(code, root).strip() == "[]"


def test_public_names_are_listed_and_unknown_ones_are_refused():
    assert set(mossrlhf.__all__) <= set(dir(mossrlhf))
    with pytest.raises(AttributeError, match="no_such_name"):
        mossrlhf.no_such_name  # noqa: B018


def test_the_version_is_said_in_one_place(root):
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"^version *=", project, re.MULTILINE)
    path = re.search(r'^\[tool.hatch.version\]\npath = "(.+)"$', project, re.MULTILINE)[1]
    said = (root / path).read_text(encoding="utf-8")
    assert f'__version__ = "{mossrlhf.__version__}"' in said


def test_what_says_the_version_again_says_the_same(root):
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == mossrlhf.__version__
    assert mossrlhf.__version__ in (root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_command_is_declared():
    try:
        entries = metadata.distribution("mossrlhf").entry_points
    except metadata.PackageNotFoundError:
        pytest.skip("mossrlhf is not installed here, only on the path")
    (command,) = [entry for entry in entries if entry.name == "mossrlhf"]
    assert callable(command.load())


@pytest.mark.parametrize("name", ["LICENSE", "DATA_LICENSE", "MODEL_LICENSE"])
def test_licenses_are_complete(root, name):
    first, last, words = {
        "LICENSE": ("Apache License", "limitations under the License.", 1500),
        "DATA_LICENSE": ("Attribution-NonCommercial 4.0", "at creativecommons.org.", 2500),
        "MODEL_LICENSE": ("GNU AFFERO GENERAL PUBLIC", "<http://www.gnu.org/licenses/>.", 5000),
    }[name]
    text = (root / name).read_text(encoding="utf-8").strip()
    assert first in text[:200]
    assert text.endswith(last)
    assert len(text.split()) > words


def test_annotations_are_checked_under_pytest():
    """The import hook is in force: torch itself would broadcast this shape and take this dtype."""
    row, token = torch.zeros(1, 3), torch.zeros(2, 3)
    assert clipped_policy_loss(token, token, token).shape == (2, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        clipped_policy_loss(token, token, row)
    with pytest.raises(jaxtyping.TypeCheckError):
        clipped_policy_loss(token, token, token.long())
