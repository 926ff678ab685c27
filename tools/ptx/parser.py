"""Parser of PTX: reads variables, functions and statements. It knows the grammar, not what an opcode means."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field

BYTES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "b128": 16, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "pred": 1}
BYTES |= {f"{sign}{8 * size}": size for sign in "us" for size in (1, 2, 4, 8)} | {"f32": 4, "f64": 8}


class PtxError(Exception):
    """Failure to compile, read, translate or run a module."""


@dataclass(frozen=True)
class Location:
    """Place in the source that an instruction comes from; `inlined_at` is the call that brought it there."""

    file: str
    line: int
    inlined_at: Location | None = None

    def __str__(self) -> str:
        file = self.file.removeprefix(f"{os.getcwd()}/")
        return f"{file}:{self.line}" + (f", inlined at {self.inlined_at}" if self.inlined_at else "")


@dataclass(frozen=True)
class Variable:
    """Variable of a state space. `count` is None for an array without a size, which is dynamic shared memory."""

    name: str
    space: str
    type: str
    align: int
    count: int | None
    values: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return BYTES[self.type] * (self.count or 0)


@dataclass(frozen=True)
class Statement:
    """Instruction (`op` with operands), or a label, whose `op` is empty."""

    line: int
    op: str
    operands: tuple[str, ...] = ()
    guard: str = ""
    location: Location | None = None


@dataclass
class Function:
    """Kernel (.entry) or function (.func). Scopes are resolved: each register, label and variable has its own name."""

    name: str
    entry: bool
    line: int
    params: list[Variable]
    returns: list[Variable]
    body: list[Statement] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    required_threads: int | None = None
    max_threads: int | None = None


@dataclass
class Module:
    """Contents of a .ptx file."""

    text: str
    target: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)


NAME = r"[\w$%]+"
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"", re.S)
_LINE_DIRECTIVE = re.compile(
    r"\.(loc|file|version|target|address_size|maxntid|minnctapersm|reqntid|maxnreg|noreturn)\b[^\n]*"
)
_LABEL = re.compile(rf"({NAME})\s*:(?!:)")
_VARIABLE = re.compile(
    r"((?:\.(?:visible|weak|extern|common)\s+)*)\.(global|const|shared|local|param)\s+((?:\.\w+(?:\s+\d+)?\s+)*)"
    rf"({NAME})\s*((?:\[\s*\w*\s*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)


def split(text: str) -> tuple[str, ...]:
    """Split the operands of an instruction at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return (*parts, last) if last else tuple(parts)


def _variable(text: str, line: int) -> Variable:
    found = _VARIABLE.match(text)
    if not found:
        raise PtxError(f"line {line}: cannot read the variable {text!r}")
    _, space, qualifiers, name, array, values = found.groups()
    align = re.search(r"\.align\s+(\d+)", qualifiers)
    kind = re.sub(r"\.align\s+\d+|\.ptr|\.(global|shared|const)\b", "", qualifiers).split()[0][1:]
    sizes = re.findall(r"\[\s*(\w*)\s*\]", array)
    count: int | None = 1
    for size in sizes:
        count = count * int(size, 0) if size and count is not None else None
    initial = split(values.strip().strip("{}")) if values else ()
    return Variable(name, space, kind, int(align[1]) if align else BYTES[kind], count, initial)


def _header(text: str, line: int) -> Function:
    entry = ".entry" in text
    lists = re.findall(r"\(([^)]*)\)", text)
    name = re.search(rf"\.(?:entry|func)\s*(?:\([^)]*\))?\s*({NAME})", text)
    if not name:
        raise PtxError(f"line {line}: cannot read the function {text!r}")
    returns_first = bool(re.search(r"\.func\s*\(", text))
    params = lists[1:] if returns_first else lists
    read = lambda block: [_variable(p, line) for p in split(block)]
    return Function(
        name[1],
        entry,
        line,
        read(params[0]) if params else [],
        read(lists[0]) if returns_first else [],
        max_threads=None,
    )


class _Reader:
    def __init__(self, text: str) -> None:
        self.module = Module(text)
        # nvcc writes the names of the files after the functions that refer to them.
        self.files = {int(n): path for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
        self.location: Location | None = None
        self.function: Function | None = None
        self.scopes: list[dict[str, str]] = []
        self.scope_count = 0
        self.pending_threads = ""
        # Comments go, their line breaks stay; strings stay as they are.
        self.text = _COMMENT.sub(lambda m: m[0] if m[0][0] == '"' else "\n" * m[0].count("\n"), text)

    def read(self) -> Module:
        at, line, end = 0, 1, len(self.text)
        while True:
            while at < end and self.text[at].isspace():
                line += self.text[at] == "\n"
                at += 1
            if at == end:
                break
            stop = self.step(at, line)
            line += self.text.count("\n", at, stop)
            at = stop
        for function in self.module.functions.values():
            self._resolve_labels(function)
        return self.module

    def step(self, at: int, line: int) -> int:
        """Consume one statement, directive, label or brace; return where the next begins."""
        if found := _LINE_DIRECTIVE.match(self.text, at):
            self.directive(found[1], found[0], line)
            return found.end()
        if self.text.startswith(".section", at):
            return self.text.index("}", at) + 1
        return self.inside(self.function, at, line) if self.function else self.outside(at, line)

    def inside(self, function: Function, at: int, line: int) -> int:
        """Consume one statement, label or brace of a function; return where the next begins."""
        if self.text[at] == "{":
            self.scope_count += 1
            self.scopes.append({})
            return at + 1
        if self.text[at] == "}":
            self.scopes.pop()
            if not self.scopes:
                self.function = None
                self.location = None
            return at + 1
        if found := _LABEL.match(self.text, at):
            table = re.compile(r"\s*\.branchtargets([^;]*);").match(self.text, found.end())
            if table:
                function.tables[found[1]] = split(table[1])
                return table.end()
            function.body.append(Statement(line, "", (self.declare(found[1], "label"),)))
            return found.end()
        stop = self.text.index(";", at)
        self.statement(self.text[at:stop].strip(), line)
        return stop + 1

    def outside(self, at: int, line: int) -> int:
        """Consume the head of a function or one variable; return where the next begins."""
        stop = at
        while self.text[stop] not in ";{" or (self.text[stop] == "{" and "=" in self.text[at:stop]):
            stop += 1
        text = self.text[at:stop].strip()
        if ".entry" in text or ".func" in text:
            self.head(text, line, declared_only=self.text[stop] != "{")
        elif _VARIABLE.match(text):
            variable = _variable(text, line)
            self.module.variables[variable.name] = variable
        elif not text.startswith((".pragma", ".alias")):
            raise PtxError(f"line {line}: cannot read {text.splitlines()[0]!r}")
        return stop + 1

    def head(self, text: str, line: int, declared_only: bool) -> None:
        """Read the head of a function; enter the function unless its body is elsewhere."""
        for found in re.finditer(r"\.(maxntid|reqntid)[^\n]*", text):
            self.directive(found[1], found[0], line)
        text = re.sub(r"\.(maxntid|minnctapersm|reqntid|maxnreg|noreturn|pragma)[^\n]*", "", text)
        function = _header(text, line)
        if declared_only:
            return
        self.function = function
        self.module.functions[function.name] = function
        self.scopes = [{}]
        if threads := [int(n) for n in re.findall(r"\d+", self.pending_threads)]:
            function.max_threads = math.prod(threads)
            function.required_threads = function.max_threads if "reqntid" in self.pending_threads else None
        self.pending_threads = ""

    def directive(self, kind: str, text: str, line: int) -> None:
        if kind == "loc":
            numbers = [int(n.strip(",")) for n in text.split()[1:3]]
            inlined = re.search(r"inlined_at\s+(\d+)\s+(\d+)", text)
            caller = Location(self.files.get(int(inlined[1]), inlined[1]), int(inlined[2])) if inlined else None
            file = self.files.get(numbers[0], str(numbers[0]))
            # Line 0 is code that the compiler made up: the line before says more.
            if numbers[1]:
                self.location = Location(file, numbers[1], caller)
        elif kind == "target":
            self.module.target = text.split()[1].strip(",")
        elif kind in ("maxntid", "reqntid"):
            self.pending_threads = text

    def declare(self, name: str, kind: str) -> str:
        """Add a name to this scope; return the one that is unique in its function."""
        unique = name if len(self.scopes) == 1 else f"{name}$s{self.scope_count}"
        self.scopes[-1][name] = unique
        if kind != "label":
            assert self.function
            self.function.registers[unique] = kind
        return unique

    def lookup(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def statement(self, text: str, line: int) -> None:
        assert self.function
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            _, kind, names = text.split(maxsplit=2)
            for name in split(names):
                ranged = re.match(rf"({NAME})<(\d+)>", name)
                for each in [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]:
                    self.declare(each, kind.lstrip("."))
            return
        if text.startswith("."):
            variable = _variable(text, line)
            unique = variable.name if len(self.scopes) == 1 else f"{variable.name}$s{self.scope_count}"
            self.scopes[-1][variable.name] = unique
            self.function.variables[unique] = Variable(
                unique, variable.space, variable.type, variable.align, variable.count, variable.values
            )
            return
        guard = re.match(rf"@\s*(!?\s*{NAME})\s+", text)
        rest = text[guard.end() :] if guard else text
        parts = rest.split(None, 1)
        op, operands = parts[0], parts[1] if len(parts) > 1 else ""
        rename = lambda s: re.sub(rf"(?<![\w.$%]){NAME}", lambda m: self.lookup(m[0]), s)
        self.function.body.append(
            Statement(
                line,
                op,
                tuple(rename(o) for o in split(operands)),
                rename(guard[1].replace(" ", "")) if guard else "",
                self.location,
            )
        )

    @staticmethod
    def _resolve_labels(function: Function) -> None:
        """Give branches the unique names of their labels. A label that comes later had no unique name yet."""
        labels = [s.operands[0] for s in function.body if not s.op]
        known = set(labels)
        for i, s in enumerate(function.body):
            if s.op.split(".")[0] == "bra" and s.operands[0] not in known:
                later = [
                    t.operands[0]
                    for t in function.body[i:]
                    if not t.op and t.operands[0].split("$s")[0] == s.operands[0]
                ]
                if not later:
                    raise PtxError(f"line {s.line}: no label {s.operands[0]}")
                function.body[i] = Statement(s.line, s.op, (later[0],), s.guard, s.location)


def parse(text: str) -> Module:
    """Parse the text of a .ptx file. Raises PtxError with the line that cannot be read."""
    return _Reader(text).read()
