"""Calling functions of the user's with the keywords that they take."""

import inspect
from collections.abc import Callable
from typing import Any


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
