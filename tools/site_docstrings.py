"""How this project's docstrings read as Markdown: an extension of griffe, for mkdocstrings."""

import re
from typing import Any

import griffe

SOURCE = re.compile(r"^Source: ", re.MULTILINE)
LITERAL = re.compile(r"::(?=\n\n +\S)")


class Docstrings(griffe.Extension):
    """Keeps ``Source:`` a line of text, where it would be a box, and ``::`` out of sight."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of whatever has been read.

        Args:
            obj: a module, class, function or attribute.
            kwargs: not used.
        """
        if obj.docstring is not None:
            text = LITERAL.sub(":", obj.docstring.value)
            obj.docstring.value = SOURCE.sub("**Source:** ", text)
