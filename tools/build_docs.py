"""Write reference pages from the docstrings into site/: `make docs`."""

from pathlib import Path

import pdoc

import mossrlhf


def main() -> None:
    """Render the package, its lazy names brought in first: pdoc looks no further than vars()."""
    for name in mossrlhf.__all__:
        setattr(mossrlhf, name, getattr(mossrlhf, name))
    pdoc.render.configure(docformat="google", math=True)
    pdoc.pdoc("mossrlhf", output_directory=Path(__file__).resolve().parent.parent / "site")


if __name__ == "__main__":
    main()
