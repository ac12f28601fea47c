"""The version of this package, and those of the packages that its numbers depend on."""

from importlib.metadata import version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions of mossrlhf, torch, transformers, accelerate and peft."""
    names = ("torch", "transformers", "accelerate", "peft")
    return {"mossrlhf": __version__, **{name: version(name) for name in names}}
