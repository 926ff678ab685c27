"""Extension of griffe, for mkdocs, that rewrites what it would misread or show as a private name.

Docstrings may have one line for several arguments, `lr, momentum: ...`. Defaults of signatures may be constants, of
which readers want the value. Options of stages are in no written signature: see optimizers/stage_options.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

# Constants that are defaults, and the values that signatures show.
_SHOWN = {"NS_STEPS": "5"}

# Names, which may go on in further lines, and their description.
_GROUP = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:,\s+\w+)+): (?P<text>.+(?:\n(?P=indent) +\S.*)*)", re.MULTILINE)
# A paragraph whose further lines are indented: griffe would take it for a box with a title.
_SOURCES = re.compile(r"^(?P<first>Sources?: .+)(?P<rest>(?:\n +\S.*)+)", re.MULTILINE)


def one_entry_each(docstring: str) -> str:
    """Return the docstring with an entry for every name.

    >>> one_entry_each("Args:\\n    a, b: numbers.\\n    c: text")
    'Args:\\n    a: numbers.\\n    b: numbers.\\n    c: text'
    """
    return _GROUP.sub(
        lambda found: "\n".join(
            f"{found['indent']}{name}: {found['text']}" for name in re.split(r",\s+", found["names"])
        ),
        docstring,
    )


def stage_options() -> Iterator[tuple[str, str]]:
    """Yield option and help text of every stage that has one."""
    for path in sorted(Path("muon_kernels/stages").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assigned = [n for n in node.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
                values = {n.targets[0].id: n.value for n in assigned if isinstance(n.targets[0], ast.Name)}
                if "help" in values:
                    yield ast.literal_eval(values["option"]), ast.literal_eval(values["help"])


class GroupedArguments(griffe.Extension):
    """The extension that mkdocs.yml names."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Put values for constants into a signature."""
        for parameter in func.parameters:
            if (shown := _SHOWN.get(str(parameter.default))) is not None:
                parameter.default = shown
        if func.path.endswith(".Muon.__init__"):
            names = [p.name for p in func.parameters]
            del func.parameters["others"]
            for option, _ in stage_options():
                if option not in names:
                    func.parameters.add(
                        griffe.Parameter(
                            option, annotation="bool", kind=griffe.ParameterKind.keyword_only, default="False"
                        )
                    )

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring is None:
            return
        obj.docstring.value = _SOURCES.sub(
            lambda found: found["first"] + re.sub(r"\n +", "\n", found["rest"]), obj.docstring.value
        )
        if re.search(r"^ *(Args|Attributes|Raises):$", obj.docstring.value, re.MULTILINE):
            obj.docstring.value = one_entry_each(obj.docstring.value)
        if obj.name == "Muon":
            head, raises, tail = obj.docstring.value.partition("\n\nRaises:")
            obj.docstring.value = "\n".join([head, *(f"    {o}: {h}" for o, h in stage_options())]) + raises + tail
