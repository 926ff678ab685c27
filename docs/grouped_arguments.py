"""For mkdocs: mends what griffe misreads in docstrings, such as one line for several arguments, `lr, momentum: ...`."""

from __future__ import annotations

import re
from typing import Any

import griffe

# Names, of which the last line may hold the end only, and what is said of them.
_GROUP = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:,\s+\w+)+): (?P<text>.+(?:\n(?P=indent) +\S.*)*)", re.MULTILINE)
# A paragraph whose further lines are indented, which griffe takes for a box with a title.
_SOURCES = re.compile(r"^(?P<first>Sources?: .+)(?P<rest>(?:\n +\S.*)+)", re.MULTILINE)


def apart(docstring: str) -> str:
    """The docstring with an entry for every name.

    >>> apart("Args:\\n    a, b: numbers.\\n    c: text")
    'Args:\\n    a: numbers.\\n    b: numbers.\\n    c: text'
    """
    return _GROUP.sub(
        lambda found: "\n".join(
            f"{found['indent']}{name}: {found['text']}" for name in re.split(r",\s+", found["names"])
        ),
        docstring,
    )


class GroupedArguments(griffe.Extension):
    """What mkdocs.yml names."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring is None:
            return
        obj.docstring.value = _SOURCES.sub(
            lambda found: found["first"] + re.sub(r"\n +", "\n", found["rest"]), obj.docstring.value
        )
        if re.search(r"^ *(Args|Attributes|Raises):$", obj.docstring.value, re.MULTILINE):
            obj.docstring.value = apart(obj.docstring.value)
