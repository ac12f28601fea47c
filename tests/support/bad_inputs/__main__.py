"""Give every bad input, and write what came as JSON; or write the page."""

import json
import logging
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from bad_inputs import ROOMS
from bad_inputs.page import PAGE, text
from bad_inputs.shop import Shop


def outcomes() -> dict[str, str]:
    """Give every bad input in a folder of its own; return by title and input what came."""
    found = {}
    for room in ROOMS:
        for row in room.rows:
            with tempfile.TemporaryDirectory() as folder:
                torch.manual_seed(0)
                found[f"{room.title}: {row.given}"] = row.run(Shop(Path(folder)))
    return found


def main() -> None:
    """Write the page; with ``--run PATH``, what came of every input."""
    if sys.argv[1:2] != ["--run"]:
        PAGE.write_text(text(), encoding="utf-8")
        return
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    Path(sys.argv[2]).write_text(json.dumps(outcomes(), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
