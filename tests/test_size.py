"""Functions and modules of the package are no longer than a reader can hold; ruff counts branches and statements."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import muon_kernels

PACKAGE = Path(muon_kernels.__file__).parent
MOST_OF_A_FUNCTION = 60
MOST_OF_A_MODULE = 450

# Tables of data, which are read a row at a time.
DATA = {"rules.py"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(function: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1  # type: ignore[operator]
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1  # type: ignore[operator]
    return lines


def is_kernel(function: Function) -> bool:
    """Whether Triton compiles it: a kernel is one function, as Triton inlines what it calls."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def long_functions(source: str, most: int) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function) and not is_kernel(node) and code_lines(node) > most:
            yield node.name


def sources() -> dict[str, str]:
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in PACKAGE.rglob("*.py")}


def test_no_function_is_too_long() -> None:
    found = {(name, long) for name, text in sources().items() for long in long_functions(text, MOST_OF_A_FUNCTION)}
    assert found == set()


def test_no_module_is_too_long() -> None:
    found = {name for name, text in sources().items() if len(text.splitlines()) > MOST_OF_A_MODULE}
    assert found == DATA


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(\n    x,\n):\n    return x\n", ["f"]),
        ("async def f():\n    x = 1\n    y = 2\n    return x\n", ["f"]),
        ("class A:\n    def f(self):\n        def g():\n            return 1\n        return g\n", ["f"]),
        ('def f(x):\n    """Return it.\n\n    Always.\n    """\n    x += 1\n    return x\n', []),
        ("@triton.jit\ndef f(x):\n    x += 1\n    x += 2\n    return x\n", []),
        ("@cache\ndef f(x):\n    x += 1\n    return x\n", []),
    ],
)
def test_a_long_function_is_seen(source: str, found: list[str]) -> None:
    assert list(long_functions(source, 3)) == found
