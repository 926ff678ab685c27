"""Docstrings open with a verb in the imperative or with a whole noun phrase, never with a fragment of a sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# First words of clauses without a verb of their own, and of phrases whose noun is left to the reader to guess.
FRAGMENTS = frozenset(
    "all also and as at because both but by even for from how if in into it its likewise neither no none nor not "
    "nothing of on only or other others our over same see so such that them then there these those through "
    "to under until what when where which while who whom whose why with within without".split()
)


def files() -> list[str]:
    """Return the sources whose docstrings are looked at, relative to the repository."""
    found = [*ROOT.glob("muon_kernels/**/*.py"), *ROOT.glob("bench/*.py")]
    return [path.relative_to(ROOT).as_posix() for path in sorted(found)]


def documented(tree: ast.Module) -> Iterator[tuple[str, str, bool]]:
    """Yield (name, docstring, whether it is a function that returns a bool) of a module and of all in it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        returns = (
            "" if isinstance(node, ast.Module | ast.ClassDef) or node.returns is None else ast.unparse(node.returns)
        )
        if (text := ast.get_docstring(node)) is not None:
            yield getattr(node, "name", "module"), text, re.match(r"bool$|TypeGuard\b", returns) is not None


def fragments(source: str) -> list[str]:
    """Return the docstrings of a source, each by its first line, that open with a fragment."""
    found = []
    for name, text, is_predicate in documented(ast.parse(source)):
        line = text.partition("\n")[0]
        word = line.split()[0].strip(",.:;").lower()
        if word in FRAGMENTS or (word == "whether" and not is_predicate) or not re.match(r"[\w`]", line):
            found.append(f"{name}: {line}")
    return found


@pytest.mark.parametrize("name", files())
def test_docstrings_open_with_a_verb_or_a_noun_phrase(name: str) -> None:
    """Read every docstring of a file, those of private functions too."""
    assert fragments((ROOT / name).read_text()) == []


PLANTED = """
'''By rank.'''
class C:
    '''Of all.'''
    def _f(self) -> int:
        '''What it costs.'''
    @property
    def g(self) -> str:
        '''Whether it is long.'''
    async def h(self):
        '''(batch, rows) of it.'''
        def inner():
            '''See `C`.'''
"""
SOUND = """
'''`n` matrices of a stack.'''
class C:
    def f(self) -> bool:
        '''Whether it is long.'''
    def g(self):
        '''Return it.'''
    def none(self):
        pass
"""


def test_fragments_are_found() -> None:
    """Find them wherever they stand, and only them: a predicate may say "Whether"."""
    assert sorted(line.split(":")[0] for line in fragments(PLANTED)) == ["C", "_f", "g", "h", "inner", "module"]
    assert fragments(SOUND) == []
    assert len(files()) > 60
