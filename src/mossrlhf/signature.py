"""Calling functions of the user's, and models, with what they ask for."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def call_with(function: Callable[..., Any], *args: Any, **optional: Any) -> Any:
    """Call a function with those of the optional keywords that it takes.

    Args:
        function: a component of ours or of the user's: ``lambda rewards, values, mask: …``.
        args: always passed.
        optional: passed where named, or where the function takes any keyword.

    Source: ours.
    """
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        names = {p.name for p in parameters}
        optional = {name: value for name, value in optional.items() if name in names}
    return function(*args, **optional)


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward, adapters unwrapped, names `argument`.

    Args:
        model: a transformers model, with or without PEFT adapters around it.
        argument: the keyword.

    Source: ours.
    """
    return argument in inspect.signature(inside(model).forward).parameters


def inside(model: nn.Module) -> nn.Module:
    """Return the transformers model that PEFT adapters are wrapped around, or the model itself.

    Args:
        model: a transformers model, with or without PEFT adapters around it.

    Source: ours.
    """
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()
