"""What is collected, of tests and of doctests alike."""

from importlib.util import find_spec
from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the one module that cannot be imported where triton is not installed.

    Not `--doctest-ignore-import-errors`: a test file that cannot be imported would be passed over.
    """
    if collection_path.name == "triton_rows.py" and find_spec("triton") is None:
        return True
    return None
