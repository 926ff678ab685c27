"""Translator from PTX to C++: one function for each .entry or .func, with registers as locals.

The second half is the table of opcodes: a function that writes the C++ of an instruction for each.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass

from .parser import BYTES, NAME, Function, Module, PtxError, Statement, Variable

ROUND = {"n": "nearest", "z": "zero", "m": "down", "p": "up", "a": "up"}
SPACES = {"global": "global", "shared": "shared", "local": "local", "const": "constant", "param": "generic"}
_CTYPES = {"b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64", "b128": "u128", "pred": "bool"}
_SPECIAL = {
    "tid": "t.tid[{}]",
    "ntid": "t.block->grid->launch.block[{}]",
    "ctaid": "t.block->id[{}]",
    "nctaid": "t.block->grid->launch.grid[{}]",
    "clusterid": "Special::clusterid(t, {})",
    "nclusterid": "Special::nclusterid(t, {})",
    "cluster_ctaid": "Special::cluster_ctaid(t, {})",
    "cluster_nctaid": "Special::cluster_nctaid(t, {})",
}
_SPECIAL_SCALAR = {
    "laneid": "Special::laneid(t)",
    "warpid": "Special::warpid(t)",
    "nwarpid": "u32(t.block->warps.size())",
    "smid": "0u",
    "nsmid": "1u",
    "gridid": "u64(0)",
    "cluster_ctarank": "t.block->rank",
    "cluster_nctarank": "t.block->grid->launch.cluster",
    "is_explicit_cluster": "t.block->grid->launch.cluster > 1",
    "clock": "u32(Special::clock(t))",
    "clock_hi": "u32(Special::clock(t) >> 32)",
    "clock64": "Special::clock(t)",
    "globaltimer": "Special::clock(t)",
    "globaltimer_lo": "u32(Special::clock(t))",
    "dynamic_smem_size": "t.block->grid->launch.dynamic_shared",
    "total_smem_size": "t.block->shared_bytes",
    "envreg1": "u32(reinterpret_cast<u64>(t.block->grid->workspace) >> 32)",
    "envreg2": "u32(reinterpret_cast<u64>(t.block->grid->workspace))",
}


def ctype(kind: str) -> str:
    return _CTYPES.get(kind, kind)


def identifier(name: str) -> str:
    """Make a C++ name from a PTX name."""
    return "v_" + re.sub(r"\W", lambda m: {"%": "", "$": "_S"}[m[0]], name)


def align_up(n: int, align: int) -> int:
    return (n + align - 1) // align * align


@dataclass(frozen=True)
class Kernel:
    """Facts that a launch of a kernel needs."""

    name: str
    line: int
    params: tuple[tuple[int, Variable], ...]  # with their offsets
    param_bytes: int
    static_shared: int
    max_threads: int | None
    required_threads: int | None


@dataclass
class Instruction:
    """Statement on its way to C++, as the functions of the opcode table see it."""

    statement: Statement
    body: _Body

    def __post_init__(self) -> None:
        self.parts = self.statement.op.split(".")
        self.ops = self.statement.operands
        self.line = self.statement.line
        self.types = [p for p in self.parts[1:] if p in BYTES or p == "tf32"]

    def has(self, *names: str) -> bool:
        return any(name in self.parts for name in names)

    def fail(self, why: str) -> PtxError:
        s = self.statement
        at = f" ({s.location})" if s.location else ""
        return PtxError(f"line {self.line}{at}: {why}: {s.op} {', '.join(s.operands)};")

    @property
    def type(self) -> str:
        if not self.types:
            raise self.fail("no type")
        return ctype(self.types[-1])

    def round(self, default: str = "nearest") -> str:
        for part in self.parts[1:]:
            if found := re.fullmatch(r"r([nzmpa])i?", part):
                return f"Round::{ROUND[found[1]]}"
        return f"Round::{default}"

    def space(self) -> str:
        for part in self.parts[1:]:
            if (name := part.split("::")[0]) in SPACES:
                return f"Space::{SPACES[name]}"
        return "Space::generic"

    def src(self, i: int, kind: str | None = None) -> str:
        return self.body.value(self, self.ops[i], kind or self.type)

    def address(self, i: int) -> str:
        return self.body.address(self, self.ops[i])

    def dst(self, i: int = 0) -> str:
        """Register that operand `i` names, or a sink for `_`."""
        return self.body.target(self, self.ops[i])

    def set(self, expression: str, i: int = 0) -> str:
        return f"set({self.dst(i)}, {expression});"

    def vector(self, i: int) -> list[str]:
        """Elements of an operand {a, b}; a scalar operand is its only element."""
        text = self.ops[i]
        return [e.strip() for e in text.strip("{}").split(",")] if text.startswith("{") else [text]


class _Body:
    """Translator of the statements of one function."""

    def __init__(self, module: Module, function: Function, shared: dict[str, int]) -> None:
        self.module, self.function, self.shared = module, function, shared
        self.used: dict[str, str] = {}
        self.labels = {s.operands[0]: i for i, s in enumerate(function.body) if not s.op}
        # For every accumulator of a wgmma a variable with the group that writes it.
        self.accumulators = {
            r.strip(): f"group_{identifier(s.operands[0].strip('{} ').split(',')[0].strip())}"
            for s in function.body
            if s.op.startswith("wgmma.mma_async")
            for r in s.operands[0].strip("{}").split(",")
        }
        self.params: dict[str, int] = {}
        offset = 0
        for p in function.params if function.entry else []:
            offset = align_up(offset, p.align)
            self.params[p.name] = offset
            offset += p.bytes
        self.param_bytes = offset

    def is_register(self, name: str) -> bool:
        return name in self.function.registers

    def register_type(self, name: str) -> str:
        """C++ type of a register: unsigned bits of its width, whatever type it is declared with."""
        kind = self.function.registers[name]
        return "bool" if kind == "pred" else ctype(f"b{8 * BYTES[kind]}")

    def register(self, name: str) -> str:
        self.used[name] = self.register_type(name)
        return identifier(name)

    def target(self, ins: Instruction, text: str) -> str:
        if text == "_":
            return "sink"
        if not self.is_register(text):
            raise ins.fail(f"{text} is no register")
        return self.register(text)

    def symbol(self, name: str) -> str | None:
        """Address of a variable in its own state space; None if there is no such variable."""
        if name in self.shared:
            return f"u64({self.shared[name]})"
        if name in self.params:
            return f"u64({self.params[name]})"
        own = [v.name for v in (*self.function.params, *self.function.returns)] if not self.function.entry else []
        if name in self.function.variables or name in own:
            return f"reinterpret_cast<u64>({identifier(name)})"
        if name in self.module.variables:
            if self.module.variables[name].space == "shared":
                return "u64(t.block->dynamic)"
            return f"reinterpret_cast<u64>({identifier(name)})"
        return None

    def value(self, ins: Instruction, text: str, kind: str) -> str:
        """C++ expression that reads an operand as a value of the C++ type `kind`."""
        kind = ctype(kind)
        if text.startswith("!"):
            return f"!{self.value(ins, text[1:].strip(), kind)}"
        if self.is_register(text):
            return f"as<{kind}>({self.register(text)})"
        if (special := self.special(text)) is not None:
            return f"as<{kind}>({special})"
        if found := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
            wide = found[1] in "dD"
            if (wide and kind == "f32") or (not wide and kind == "f64"):
                x = struct.unpack("<d" if wide else "<f", bytes.fromhex(found[2])[::-1])[0]
                return f"as<{kind}>({float_bits(x, kind)})"
            return f"as<{kind}>({'u64' if wide else 'u32'}(0x{found[2]}))"
        if re.fullmatch(r"-?\d+[uU]?|-?0[xX][0-9a-fA-F]+[uU]?|-?0[0-7]+", text):
            number = int(text.rstrip("uU"), 0 if not re.fullmatch(r"-?0[0-7]+", text) else 8)
            if kind in ("f32", "f64"):
                return f"as<{kind}>({float_bits(float(number), kind)})"
            return f"as<{kind}>(u64({number & (1 << 64) - 1}ull))" if kind != "bool" else str(bool(number)).lower()
        if re.fullmatch(r"-?\d*\.\d*(?:[eE][-+]?\d+)?", text):
            return f"as<{kind}>({float_bits(float(text), kind)})"
        if text == "WARP_SZ":
            return f"{kind}(32)"
        name, plus, offset = text.partition("+")
        if (address := self.symbol(name.strip())) is not None:
            return f"as<{kind}>({address}{plus}{offset})"
        raise ins.fail(f"cannot read operand {text}")

    def special(self, text: str) -> str | None:
        if not text.startswith("%"):
            return None
        name, _, axis = text[1:].partition(".")
        if name in _SPECIAL:
            return _SPECIAL[name].format("xyz".index(axis)) if axis != "w" else "0u"
        if name.startswith("lanemask_"):
            return f'Special::lanemask(t, "{name[9:]}")'
        return _SPECIAL_SCALAR.get(name)

    def address(self, ins: Instruction, text: str) -> str:
        """C++ expression, a u64, of [register + immediate] or [symbol + immediate]."""
        inner = text.strip().lstrip("[").rstrip("]").strip()
        found = re.fullmatch(rf"({NAME})\s*(?:([+-])\s*(-?(?:0x[0-9a-fA-F]+|\d+)))?", inner)
        if not found:
            return self.value(ins, inner, "u64")
        name, sign, number = found.groups()
        offset = (int(number, 0) if number else 0) * (-1 if sign == "-" else 1)
        if self.is_register(name):
            # A 32-bit address wraps.
            if self.register_type(name) == "u32":
                return (
                    f"u64(u32({self.register(name)} + {offset & 0xFFFFFFFF}u))"
                    if offset
                    else f"u64({self.register(name)})"
                )
            return f"{self.register(name)} + {offset & (1 << 64) - 1}ull" if offset else self.register(name)
        symbol = self.symbol(name)
        if symbol is None:
            return self.value(ins, inner, "u64")
        return f"{symbol} + {offset}" if offset else symbol

    def param_pointer(self, ins: Instruction, text: str) -> str:
        """C++ pointer to the memory of ld.param or st.param."""
        name = re.split(r"[+\s]", text.strip("[] "))[0]
        # Those of an entry are addressed by offset (32-bit registers must hold their addresses), a call's are arrays.
        base = "reinterpret_cast<u64>(t.block->grid->launch.params) + "
        if name not in self.params and not self.is_register(name):
            base = ""
        return f"reinterpret_cast<u8*>({base}{self.address(ins, text)})"

    def translate(self) -> str:
        lines = []
        for i, s in enumerate(self.function.body):
            if not s.op:
                lines.append(f"{identifier(s.operands[0])}: ;")
                continue
            ins = Instruction(s, self)
            base = ins.parts[0]
            if base not in OPCODES:
                raise ins.fail("unknown opcode")
            code = OPCODES[base](ins)
            if self.accumulators and base != "wgmma":
                touched = {
                    self.accumulators[r] for o in s.operands for r in re.findall(NAME, o) if r in self.accumulators
                }
                moved = str(base == "mov").lower()
                code = "".join(f"accumulators_ready(t, {g}, {moved}, {s.line}); " for g in sorted(touched)) + code
            if base == "bra" and self.labels[s.operands[0]] <= i:
                code = f"back(t, {s.line}); {code}"
            if s.guard:
                code = f"if ({self.value(ins, s.guard, 'bool')}) {{ {code} }}"
            lines.append(f"AT({s.line}) {code}")
        locals_ = [f"    {kind} {identifier(name)} = {kind}(~u64(0));" for name, kind in self.used.items()]
        locals_ += [f"    u32 {group} = 0;" for group in sorted(set(self.accumulators.values()))]
        arrays = [
            f"    alignas({max(v.align, 16)}) u8 {identifier(v.name)}[{max(v.bytes, 1)}];"
            for v in self.function.variables.values()
            if v.space in ("local", "param")
        ]
        return "\n".join(
            [*locals_, *arrays, "    u32 carry = 0; u128 sink; (void)carry; (void)sink;", *("    " + x for x in lines)]
        )

    def signature(self) -> str:
        if self.function.entry:
            return f"static void {identifier(self.function.name)}(Thread& t)"
        args = "".join(f", u8* {identifier(v.name)}" for v in (*self.function.returns, *self.function.params))
        return f"static void {identifier(self.function.name)}(Thread& t{args})"


def float_bits(x: float, kind: str) -> str:
    if kind == "f64":
        return f"u64(0x{struct.pack('>d', x).hex()}ull)"
    return f"u32(0x{struct.pack('>f', x).hex()}u)"


def _initial(variable: Variable) -> bytes:
    raw = bytearray(variable.bytes)
    size = BYTES[variable.type]
    for i, text in enumerate(variable.values):
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            data = bytes.fromhex(text[2:])[::-1]
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)", text):
            data = (int(text, 0) & (1 << 8 * size) - 1).to_bytes(size, "little")
        else:
            raise PtxError(f"variable {variable.name}: cannot read the initial value {text}")
        raw[i * size : (i + 1) * size] = data
    return bytes(raw)


def _shared_layout(module: Module, function: Function) -> tuple[dict[str, int], int]:
    """Lay out the static shared variables.

    Returns:
        Their offsets, and the size of all, which is where dynamic shared memory may begin.
    """
    offsets, end, align = {}, 1024, 16
    for v in (*module.variables.values(), *function.variables.values()):
        if v.space != "shared":
            continue
        if v.count is None:
            align = max(align, v.align)
            continue
        end = align_up(end, v.align)
        offsets[v.name] = end
        end += v.bytes
    return offsets, align_up(end, align) - 1024


def translate(module: Module, entries: Collection[str]) -> tuple[str, list[Kernel]]:
    """Translate some kernels of a module, with all its functions.

    Returns:
        The C++, and the facts that launches of the kernels need, in the order of `launch_0`, `launch_1`, … in it.
    """
    kernels, bodies, declarations = [], [], []
    for function in module.functions.values():
        if function.entry and function.name not in entries:
            continue
        shared, shared_bytes = _shared_layout(module, function)
        body = _Body(module, function, shared)
        code = body.translate()
        declarations.append(f"{body.signature()};")
        bodies.append(f"{body.signature()} {{\n{code}\n}}\n")
        if function.entry:
            index = len(kernels)
            bodies.append(
                f'extern "C" void launch_{index}(Launch* l) {{\n'
                f"    run_grid(*l, {identifier(function.name)}, {shared_bytes}, own());\n}}\n"
            )
            params = tuple((body.params[p.name], p) for p in function.params)
            kernels.append(
                Kernel(
                    function.name,
                    function.line,
                    params,
                    body.param_bytes,
                    shared_bytes,
                    function.max_threads,
                    function.required_threads,
                )
            )
    storage = [v for v in module.variables.values() if v.space in ("global", "const") and v.count is not None]
    variables = [
        f'extern "C" {{ alignas({max(v.align, 16)}) u8 {identifier(v.name)}[{max(v.bytes, 1)}] = '
        f"{{{', '.join(map(str, _initial(v) if v.values else b''))}}}; }}"
        for v in storage
    ]
    own = ", ".join(
        f"{{reinterpret_cast<u64>({identifier(v.name)}), reinterpret_cast<u64>({identifier(v.name)}) + {v.bytes}}}"
        for v in storage
    )
    head = [
        "using namespace ptx;",
        "#define AT(line) if constexpr (kProfile) ++t.block->grid->launch.profile[line].threads;",
        *variables,
        f"static std::vector<Range> own() {{ return {{{own}}}; }}",
        *declarations,
    ]
    return "\n".join([*head, *bodies]), kernels


# ---- the table of opcodes ------------------------------------------------------------------------------------------

OPCODES: dict[str, Callable[[Instruction], str]] = {}


def opcode(*names: str) -> Callable[[Callable[[Instruction], str]], Callable[[Instruction], str]]:
    def register(f: Callable[[Instruction], str]) -> Callable[[Instruction], str]:
        OPCODES.update(dict.fromkeys(names, f))
        return f

    return register


def _finish(ins: Instruction, expression: str) -> str:
    """Write a real result after the modifiers .ftz, .sat and .relu."""
    if ins.has("ftz"):
        expression = f"ftz({expression})"
    if ins.has("sat") and not ins.type.startswith(("s", "u")):
        expression = f"sat({expression})"
    if ins.has("relu"):
        expression = f"relu({expression})"
    return ins.set(expression)


def _sources(ins: Instruction, first: int = 1) -> str:
    values = [ins.src(i) for i in range(first, len(ins.ops))]
    return ", ".join(f"ftz({v})" for v in values) if ins.has("ftz") else ", ".join(values)


def _is_integer(ins: Instruction) -> bool:
    return bool(re.fullmatch(r"[usb]\d+", ins.type))


@opcode("add", "sub", "div", "fma", "sqrt", "rcp")
def _rounded(ins: Instruction) -> str:
    name = ins.parts[0]
    if ins.has("cc"):
        return ins.set(f"{name}_carry({_sources(ins)}, carry, false, true)")
    if ins.has("sat") and _is_integer(ins):
        return ins.set(f"{name}_sat({_sources(ins)})")
    return _finish(ins, f"{name}<{ins.round()}>({_sources(ins)})")


@opcode("addc", "subc")
def _carried(ins: Instruction) -> str:
    return ins.set(f"{ins.parts[0][:3]}_carry({_sources(ins)}, carry, true, {str(ins.has('cc')).lower()})")


@opcode("mul", "mad", "madc")
def _mul(ins: Instruction) -> str:
    if not _is_integer(ins):
        name = "mul" if ins.parts[0] == "mul" else "fma"
        return _finish(ins, f"{name}<{ins.round()}>({_sources(ins)})")
    how = next(p for p in ("lo", "hi", "wide") if ins.has(p))
    product = f"mul_{how}({ins.src(1)}, {ins.src(2)})"
    if ins.parts[0] == "mul":
        return ins.set(product)
    if ins.has("cc") or ins.parts[0] == "madc":
        carry_in, carry_out = str(ins.parts[0] == "madc").lower(), str(ins.has("cc")).lower()
        return ins.set(f"add_carry({product}, {ins.src(3)}, carry, {carry_in}, {carry_out})")
    wide = f"b{8 * BYTES[ins.types[-1]] * (2 if how == 'wide' else 1)}"
    return ins.set(f"{product} + as<decltype({product})>({ins.src(3, wide)})")


@opcode("min", "max")
def _minmax(ins: Instruction) -> str:
    first, *rest = (f"ftz({ins.src(i)})" if ins.has("ftz") else ins.src(i) for i in range(1, len(ins.ops)))
    for v in rest:
        first = f"{ins.parts[0]}<{str(ins.has('NaN')).lower()}>({first}, {v})"
    return _finish(ins, first)


@opcode("neg", "abs", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "copysign", "rem", "mul24", "sad", "bfind")
def _plain(ins: Instruction) -> str:
    return _finish(ins, f"{ins.parts[0]}({_sources(ins)})")


@opcode("popc", "clz", "brev", "lop3", "dp4a")
def _bits(ins: Instruction) -> str:
    if ins.parts[0] == "lop3" and len(ins.ops) != 5:
        raise ins.fail("not supported")
    return ins.set(f"{ins.parts[0]}({_sources(ins)})")


@opcode("and", "or", "xor")
def _logic(ins: Instruction) -> str:
    sign = {"and": "&", "or": "|", "xor": "^"}[ins.parts[0]]
    return ins.set(f"{ctype(ins.type)}({ins.src(1)} {sign} {ins.src(2)})")


@opcode("not")
def _not(ins: Instruction) -> str:
    return ins.set(f"!{ins.src(1)}" if ins.type == "bool" else f"{ins.type}(~{ins.src(1)})")


@opcode("cnot")
def _cnot(ins: Instruction) -> str:
    return ins.set(f"{ins.type}({ins.src(1)} == 0)")


@opcode("shl", "shr")
def _shift(ins: Instruction) -> str:
    return ins.set(f"{ins.parts[0]}({ins.src(1)}, {ins.src(2, 'u32')})")


@opcode("shf")
def _funnel(ins: Instruction) -> str:
    wrap = str(ins.has("wrap")).lower()
    return ins.set(f"shf_{ins.parts[1]}<{wrap}>({_sources(ins)})")


@opcode("bfe")
def _bfe(ins: Instruction) -> str:
    return ins.set(f"bfe({ins.src(1)}, {ins.src(2, 'u32')}, {ins.src(3, 'u32')})")


@opcode("bfi")
def _bfi(ins: Instruction) -> str:
    return ins.set(f"bfi({ins.src(1)}, {ins.src(2)}, {ins.src(3, 'u32')}, {ins.src(4, 'u32')})")


@opcode("prmt")
def _prmt(ins: Instruction) -> str:
    if len(ins.parts) != 2:
        raise ins.fail("not supported")
    return ins.set(f"prmt({_sources(ins)})")


@opcode("testp")
def _testp(ins: Instruction) -> str:
    return ins.set(f"testp_{ins.parts[1]}({ins.src(1)})")


_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(ins: Instruction) -> str:
    return "Cmp::" + _COMPARE.get(ins.parts[1], ins.parts[1])


@opcode("setp")
def _setp(ins: Instruction) -> str:
    targets = ins.ops[0].split("|")
    kind = ins.type
    pairs = kind in ("f16x2", "bf16x2")
    a, b = (f"ftz({ins.src(i)})" if ins.has("ftz") else ins.src(i) for i in (1, 2))
    combine = next((p for p in ins.parts[2:] if p in ("and", "or", "xor")), None)
    third = ins.src(3, "pred") if combine else ""
    sign = {"and": "&&", "or": "||", "xor": "!=", None: ""}[combine]
    wrap = lambda c: f"({c}) {sign} {third}" if combine else c
    code = f"{{ const auto a = {a}; const auto b = {b}; "
    if pairs:
        results = [f"compare<{_comparison(ins)}>(a.{half}, b.{half})" for half in ("lo", "hi")]
    else:
        results = [f"compare<{_comparison(ins)}>(a, b)", f"!compare<{_comparison(ins)}>(a, b)"]
    values = [wrap(r) for r in results[: len(targets)]]
    temporaries = "".join(f"const bool c{i} = {v}; " for i, v in enumerate(values))
    writes = "".join(f"set({ins.body.target(ins, name.strip())}, c{i}); " for i, name in enumerate(targets))
    return code + temporaries + writes + "}"


@opcode("set")
def _set(ins: Instruction) -> str:
    to, kind = (ctype(k) for k in ins.types)
    a, b = (f"ftz({ins.src(i, kind)})" if ins.has("ftz") else ins.src(i, kind) for i in (1, 2))
    return ins.set(f"compare_set<{to}, {_comparison(ins)}>({a}, {b})")


@opcode("selp")
def _selp(ins: Instruction) -> str:
    return ins.set(f"{ins.src(3, 'pred')} ? {ins.src(1)} : {ins.src(2)}")


@opcode("slct")
def _slct(ins: Instruction) -> str:
    kind = ctype(ins.types[0])
    return ins.set(f"{ins.src(3, ins.types[1])} >= 0 ? {ins.src(1, kind)} : {ins.src(2, kind)}")


@opcode("mov")
def _mov(ins: Instruction) -> str:
    kind = ins.type
    size = BYTES[ins.types[-1]]
    if ins.ops[1].startswith("{"):
        parts = ins.vector(1)
        each = f"u{8 * size // len(parts)}"
        bits = {4: "u32", 8: "u64", 16: "u128"}[size]
        values = [
            f"{bits}({ins.body.value(ins, p, each)}) << {8 * size // len(parts) * i}" for i, p in enumerate(parts)
        ]
        return ins.set(f"{bits}({' | '.join(values)})")
    if ins.ops[0].startswith("{"):
        parts = ins.vector(0)
        each = f"u{8 * size // len(parts)}"
        code = f"{{ const auto v = {ins.src(1)}; "
        for i, p in enumerate(parts):
            code += f"set({ins.body.target(ins, p)}, {each}(v >> {8 * size // len(parts) * i})); "
        return code + "}"
    if "|" in ins.ops[0]:
        raise ins.fail("not supported")
    return ins.set(ins.src(1, kind))


@opcode("cvta")
def _cvta(ins: Instruction) -> str:
    value = ins.src(1)
    if ins.has("shared"):
        value = f"{'from' if ins.has('to') else 'to'}_generic(t, {value})"
    if ins.has("param"):
        value = f"{value} {'-' if ins.has('to') else '+'} reinterpret_cast<u64>(t.block->grid->launch.params)"
    return ins.set(value)


@opcode("cvt")
def _cvt(ins: Instruction) -> str:
    to, *sources = (ctype(k) for k in ins.types)
    if ins.has("pack") or len(sources) != 1:
        raise ins.fail("not supported")
    source = sources[0]
    integral = any(re.fullmatch(r"r[nzmp]i", p) for p in ins.parts)
    sat = ins.has("sat") and bool(re.fullmatch(r"[us]\d+", to))
    single = to.removesuffix("x2")
    convert = f"cvt<{single}, {ins.round()}, {str(integral).lower()}, {str(sat).lower()}>"
    value = lambda i: f"ftz({ins.src(i, source)})" if ins.has("ftz") else ins.src(i, source)
    # Of a pair the first operand is the upper half.
    result = f"{to}{{{convert}({value(2)}), {convert}({value(1)})}}" if to.endswith("x2") else f"{convert}({value(1)})"
    if ins.has("ftz") and to == "f32":
        result = f"ftz({result})"
    if ins.has("sat") and not sat:
        result = f"sat({result})"
    if ins.has("relu"):
        result = f"relu({result})"
    return ins.set(result)


# ---- memory


def _width(ins: Instruction) -> int:
    return next((int(p[1:]) for p in ins.parts if p in ("v2", "v4", "v8")), 1)


@opcode("ld", "ldu")
def _ld(ins: Instruction) -> str:
    width, kind = _width(ins), ins.type
    targets = [ins.body.target(ins, e) for e in ins.vector(0)]
    if ins.has("param"):
        read = f"Vec<{kind}, {width}> v; std::memcpy(&v, {ins.body.param_pointer(ins, ins.ops[1])}, sizeof v);"
    else:
        read = f"const auto v = load<{kind}, {width}>(t, {ins.space()}, {ins.address(1)}, {ins.line});"
    return f"{{ {read} " + " ".join(f"set({x}, v.x[{i}]);" for i, x in enumerate(targets)) + " }"


@opcode("st")
def _st(ins: Instruction) -> str:
    width, kind = _width(ins), ins.type
    values = ", ".join(ins.body.value(ins, e, kind) for e in ins.vector(1))
    vector = f"Vec<{kind}, {width}>{{{{{values}}}}}"
    if ins.has("param"):
        return f"{{ const auto v = {vector}; std::memcpy({ins.body.param_pointer(ins, ins.ops[0])}, &v, sizeof v); }}"
    return f"store<{kind}, {width}>(t, {ins.space()}, {ins.address(0)}, {ins.line}, {vector});"


_ATOMIC = {
    "add": "add<Round::nearest>(x, {0})",
    "min": "min(x, {0})",
    "max": "max(x, {0})",
    "and": "x & {0}",
    "or": "x | {0}",
    "xor": "x ^ {0}",
    "exch": "{0}",
    "inc": "x >= {0} ? 0 : x + 1",
    "dec": "x == 0 || x > {0} ? {0} : x - 1",
    "cas": "x == {0} ? {1} : x",
}


@opcode("atom", "red")
def _atom(ins: Instruction) -> str:
    returns = ins.parts[0] == "atom"
    kind = ins.type
    name = next((p for p in ins.parts[1:] if p in _ATOMIC), None)
    if name is None or _width(ins) != 1:
        raise ins.fail("not supported")
    first = 2 if returns else 1
    values = [ins.src(i) for i in range(first, first + (2 if name == "cas" else 1))]
    names = [f"v{i}" for i in range(len(values))]
    body = _ATOMIC[name].format(*names)
    code = "".join(f"const {kind} {n} = {v}; " for n, v in zip(names, values, strict=True))
    function = f"[=]({kind} x) -> {kind} {{ return {body}; }}"
    update = f"atomic<{kind}>(t, {ins.space()}, {ins.address(first - 1)}, {ins.line}, {function})"
    return f"{{ {code}{ins.set(update) if returns else update + ';'} }}"


@opcode(
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "griddepcontrol",
    "createpolicy",
    "brkpt",
    "pmevent",
)
def _nothing(ins: Instruction) -> str:
    return ins.set("u64(0)") if ins.parts[0] == "createpolicy" else ""


@opcode("setmaxnreg")
def _setmaxnreg(ins: Instruction) -> str:
    # What a thread has to begin with is known where the kernel says its threads and not its registers.
    if ins.body.function.max_threads is None or ins.body.function.required_threads is not None:
        return ""
    return f"setmaxnreg(t, {ins.src(0, 'u32')}, {str(ins.has('inc')).lower()}, {ins.line});"


@opcode("membar", "fence")
def _fence(ins: Instruction) -> str:
    return "if constexpr (kRaces) t.trace.vision.fence();" if ins.has("proxy") and "async" in ins.statement.op else ""


# ---- control


@opcode("bra")
def _bra(ins: Instruction) -> str:
    return f"goto {identifier(ins.ops[0])};"


@opcode("brx")
def _brx(ins: Instruction) -> str:
    cases = " ".join(f"case {i}: goto {identifier(x)};" for i, x in enumerate(ins.body.function.tables[ins.ops[1]]))
    default = f'default: t.fail({ins.line}, "brx.idx outside its table");'
    return f"back(t, {ins.line}); switch ({ins.src(0, 'u32')}) {{ {cases} {default} }}"


@opcode("ret")
def _ret(ins: Instruction) -> str:
    return "return;"


@opcode("exit")
def _exit(ins: Instruction) -> str:
    if not ins.body.function.entry:
        raise ins.fail("exit in a .func is not supported")
    return "return;"


@opcode("trap")
def _trap(ins: Instruction) -> str:
    return f't.fail({ins.line}, "trap");'


@opcode("call")
def _call(ins: Instruction) -> str:
    ops = list(ins.ops)
    returns = split_list(ops.pop(0)) if ops[0].startswith("(") else []
    name, args = ops[0], split_list(ops[1]) if len(ops) > 1 else []
    if name == "__assertfail":
        return f"assert_failed(t, {ins.line}, {', '.join(identifier(a) for a in args[:4])});"
    if name == "vprintf":
        return f"std::memset({identifier(returns[0])}, 0, 4);"
    if name not in ins.body.module.functions:
        raise ins.fail("not supported")
    return f"{identifier(name)}(t{''.join(', ' + identifier(a) for a in (*returns, *args))});"


def split_list(text: str) -> list[str]:
    return [x.strip() for x in text.strip("()").split(",") if x.strip()]


@opcode("bar", "barrier")
def _bar(ins: Instruction) -> str:
    parts = [p for p in ins.parts[1:] if p not in ("cta", "aligned")]
    if parts[:2] == ["warp", "sync"]:
        return f"sync_warp(t, {ins.src(0, 'u32')}, {ins.line});"
    if parts[0] == "cluster":
        return f"cluster_{parts[1]}(t, {ins.line});"
    if parts[0] in ("sync", "arrive"):
        count = ins.src(1, "u32") if len(ins.ops) > 1 else "0"
        return f"barrier(t, {ins.src(0, 'u32')}, {count}, {ins.line}, {str(parts[0] == 'sync').lower()});"
    how = {"popc": "popc", "and": "all", "or": "any"}[parts[1]]
    count = ins.src(2, "u32") if len(ins.ops) == 4 else "0"
    vote = ins.src(len(ins.ops) - 1, "pred")
    call = f"barrier(t, {ins.src(1, 'u32')}, {count}, {ins.line}, true, Reduce::{how}, {vote})"
    return ins.set(call if how == "popc" else f"bool({call})")


@opcode("nanosleep")
def _sleep(ins: Instruction) -> str:
    return f"t.spin({ins.line});"


# ---- collectives of a warp


@opcode("shfl")
def _shfl(ins: Instruction) -> str:
    target, *valid = ins.ops[0].split("|")
    value, lane, clamp, mask = (ins.src(i, "u32") for i in (1, 2, 3, 4))
    code = f"bool ok; const u32 v = shfl<Shfl::{ins.parts[2]}>(t, {value}, {lane}, {clamp}, {mask}, ok, {ins.line}); "
    code += f"set({ins.body.target(ins, target.strip())}, v); "
    code += f"set({ins.body.target(ins, valid[0].strip())}, ok); " if valid else ""
    return f"{{ {code}}}"


@opcode("vote")
def _vote(ins: Instruction) -> str:
    p, mask = ins.src(1, "pred"), ins.src(2, "u32")
    # Lanes outside the mask, or gone, vote neither way: all of those that voted is a ballot of every lane's truth.
    results = {
        "ballot": f"ballot(t, {mask}, {ins.line}, {p})",
        "any": f"ballot(t, {mask}, {ins.line}, {p}) != 0",
        "all": f"ballot(t, {mask}, {ins.line}, !({p})) == 0",
    }
    if ins.parts[2] == "uni":
        uniform = ins.set("v == 0 || v == t.warp->live")
        return f"{{ const u32 v = ballot(t, {mask}, {ins.line}, {p}); {uniform} }}"
    return ins.set(results[ins.parts[2]])


@opcode("match")
def _match(ins: Instruction) -> str:
    target, *valid = ins.ops[0].split("|")
    value, mask = ins.src(1), ins.src(2, "u32")
    if ins.parts[1] == "any":
        return ins.set(f"match_any(t, {mask}, {ins.line}, {value})")
    code = f"bool all; set({ins.body.target(ins, target.strip())}, match_all(t, {mask}, {ins.line}, {value}, all)); "
    code += f"set({ins.body.target(ins, valid[0].strip())}, all); " if valid else ""
    return f"{{ {code}}}"


@opcode("redux")
def _redux(ins: Instruction) -> str:
    kind = ins.type
    body = _ATOMIC[ins.parts[2]].format("y")
    function = f"[]({kind} x, {kind} y) -> {kind} {{ return {body}; }}"
    return ins.set(f"redux(t, {ins.src(2, 'u32')}, {ins.line}, {ins.src(1)}, {function})")


@opcode("activemask")
def _activemask(ins: Instruction) -> str:
    return ins.set("1u << t.lane")


@opcode("elect")
def _elect(ins: Instruction) -> str:
    leader, chosen = ins.ops[0].split("|")
    target = ins.body.target(ins, chosen.strip())
    code = f"u32 leader; set({target}, elect(t, {ins.src(1, 'u32')}, {ins.line}, leader)); "
    return f"{{ {code}set({ins.body.target(ins, leader.strip())}, leader); }}"


_MMA_TYPES = {"bf16", "f16", "tf32"}


@opcode("mma")
def _mma(ins: Instruction) -> str:
    shape = next(p for p in ins.parts if re.fullmatch(r"m\d+n\d+k\d+", p))
    d, a, _, _ = ins.types
    if shape == "m8n8k4" and d == "f64":
        values = [ins.body.value(ins, e, "f64") for i in (1, 2, 3) for e in ins.vector(i)]
        code = f"DmmaArg x{{{values[0]}, {values[1]}, {{{values[2]}, {values[3]}}}}}; dmma(t, {ins.line}, x); "
        return (
            f"{{ {code}"
            + " ".join(f"set({ins.body.target(ins, e)}, x.c[{i}]);" for i, e in enumerate(ins.vector(0)))
            + " }"
        )
    found = re.fullmatch(r"m16n8k(\d+)", shape)
    if not found or a not in _MMA_TYPES or d not in ("f32", "f16"):
        raise ins.fail("not supported")
    read = lambda i: ", ".join(ins.body.value(ins, e, "u32") for e in ins.vector(i))
    code = f"MmaArg<{a}, {d}, {found[1]}> x{{{{{read(1)}}}, {{{read(2)}}}, {{{read(3)}}}}}; mma(t, {ins.line}, x); "
    return (
        f"{{ {code}"
        + " ".join(f"set({ins.body.target(ins, e)}, x.c[{i}]);" for i, e in enumerate(ins.vector(0)))
        + " }"
    )


@opcode("ldmatrix", "stmatrix")
def _matrix(ins: Instruction) -> str:
    store = ins.parts[0] == "stmatrix"
    count = next(int(p[1]) for p in ins.parts if re.fullmatch(r"x[124]", p))
    if not ins.has("m8n8") or not ins.has("b16"):
        raise ins.fail("not supported")
    call = f"matrix_access<{count}, {str(ins.has('trans')).lower()}, {str(store).lower()}>(t, {ins.line}, x);"
    where = f"{ins.address(0 if store else 1)}, {ins.space()}, {ins.line}"
    if store:
        values = ", ".join(ins.body.value(ins, e, "u32") for e in ins.vector(1))
        return f"{{ MatrixArg x{{{where}, {{{values}}}}}; {call} }}"
    writes = " ".join(f"set({ins.body.target(ins, e)}, x.r[{i}]);" for i, e in enumerate(ins.vector(0)))
    return f"{{ MatrixArg x{{{where}, {{}}}}; {call} {writes} }}"


@opcode("movmatrix")
def _movmatrix(ins: Instruction) -> str:
    return ins.set(f"movmatrix(t, {ins.line}, {ins.src(1, 'u32')})")


# ---- asynchronous copies


@opcode("cp")
def _cp(ins: Instruction) -> str:
    if ins.parts[2] == "bulk":
        return _bulk(ins)
    if ins.has("commit_group"):
        return "commit_copies(t);"
    if ins.has("wait_group"):
        return f"wait_copies(t, {ins.src(0, 'u32')});"
    if ins.has("wait_all"):
        return "commit_copies(t); wait_copies(t, 0);"
    if ins.has("mbarrier"):
        return f"arrive_after_copies(t, {ins.address(0)}, {str(ins.has('noinc')).lower()}, {ins.line});"
    size = ins.src(2, "u32")
    # What follows the size is the number of bytes to read, or a predicate that ignores the source, or a cache policy.
    bytes_ = size
    if (len(ins.ops) > 3 and not ins.has("L2::cache_hint")) or len(ins.ops) > 4:
        register = ins.body.function.registers.get(ins.ops[3])
        bytes_ = f"{ins.src(3, 'pred')} ? 0u : {size}" if register == "pred" else ins.src(3, "u32")
    return f"copy_async(t, {ins.address(0)}, Space::global, {ins.address(1)}, {size}, {bytes_}, {ins.line});"


def _bulk(ins: Instruction) -> str:
    if ins.has("commit_group"):
        return "commit_bulk(t);"
    if ins.has("wait_group"):
        return f"wait_bulk(t, {ins.src(0, 'u32')});"
    if ins.has("prefetch"):
        return ""
    if ins.parts[1] == "reduce" or any("im2col" in p for p in ins.parts):
        raise ins.fail("not supported")
    load = "mbarrier::complete_tx::bytes" in ins.parts
    shared, other = (0, 1) if load else (1, 0)
    if ins.has("tensor"):
        found = re.fullmatch(r"\[\s*([^,]+),\s*\{(.*)\}\s*\]", ins.ops[other])
        assert found
        at = ", ".join(ins.body.value(ins, x.strip(), "s32") for x in found[2].split(","))
        pieces = f"box(t, {ins.address(shared)}, {ins.body.address(ins, found[1])}, {{{at}}}, fill, {ins.line})"
        barrier = 2
    else:
        pieces = f"linear(t, {ins.address(shared)}, {ins.address(other)}, {ins.src(2, 'u32')}, {ins.line})"
        barrier = 3
    multicast = ins.has("multicast::cluster")
    mask = f"const u32 mask = {ins.src(barrier + 1, 'u16')}; " if multicast else ""
    where = f"{ins.address(barrier)}, {'&mask' if multicast else 'nullptr'}" if load else ""
    call = f"load_bulk(t, pieces, fill, {where}, {ins.line});" if load else f"store_bulk(t, pieces, {ins.line});"
    return f"{{ u32 fill = 0; auto pieces = {pieces}; {mask}{call} }}"


@opcode("mapa")
def _mapa(ins: Instruction) -> str:
    if not ins.has("shared::cluster") or not ins.has("u32"):
        raise ins.fail("not supported")
    return ins.set(f"mapa(t, {ins.src(1, 'u32')}, {ins.src(2, 'u32')}, {ins.line})")


@opcode("mbarrier")
def _mbarrier(ins: Instruction) -> str:
    shared = ins.space() != "Space::generic"
    where = lambda i: ins.address(i) if shared else f"from_generic(t, {ins.address(i)})"
    kind = ins.parts[1]
    if kind == "init":
        return f"mbarrier_init(t, Space::shared, {where(0)}, {ins.src(1, 'u32')}, {ins.line});"
    if kind == "inval":
        return f"mbarrier_inval(t, {where(0)}, {ins.line});"
    if kind == "expect_tx":
        return f"mbarrier_arrive(t, {where(0)}, 0, {ins.src(1, 'u32')}, {ins.line});"
    if kind == "arrive":
        first = 0 if ins.ops[0].startswith("[") else 1
        extra = ins.src(first + 1, "u32") if len(ins.ops) > first + 1 else None
        count, bytes_ = ("1", extra) if ins.has("expect_tx") else (extra or "1", "0")
        call = f"mbarrier_arrive(t, {where(first)}, {count}, {bytes_}, {ins.line})"
        return ins.set(call) if first and ins.ops[0] != "_" else f"{call};"
    if kind in ("test_wait", "try_wait"):
        parity, block = str(ins.has("parity")).lower(), str(kind == "try_wait").lower()
        which = ins.src(2, "u32" if ins.has("parity") else "u64")
        return ins.set(f"mbarrier_wait(t, {where(1)}, {parity}, {which}, {block}, {ins.line})")
    raise ins.fail("not supported")


@opcode("wgmma")
def _wgmma(ins: Instruction) -> str:
    kind = ins.parts[1]
    if kind == "fence":
        return f'meet(t, ~0u, {ins.line}, "wgmma.fence", true, nullptr, [](Warp&, u32, void**) {{}});'
    if kind == "commit_group":
        return f"commit_wgmma(t, {ins.line});"
    if kind == "wait_group":
        return f"wait_wgmma(t, {ins.src(0, 'u32')}, {ins.line});"
    shape = next(p for p in ins.parts if re.fullmatch(r"m64n\d+k\d+", p))
    d, a, _ = ins.types
    if a not in _MMA_TYPES or d not in ("f32", "f16"):
        raise ins.fail("not supported")
    columns = re.findall(r"\d+", shape)[1]
    registers = ins.ops[1].startswith("{")
    accumulators = ins.vector(0)
    flags = [ins.src(i, "s32") for i in range(4, len(ins.ops))]
    # With A in registers only B can be transposed; tf32 has no transposition.
    scale_a, scale_b, *trans = flags
    trans_a, trans_b = {0: ("0", "0"), 1: ("0", *trans), 2: tuple(trans)}[len(trans)]
    a_descriptor = "0" if registers else ins.src(1, "u64")
    a_values = ", ".join(ins.body.value(ins, e, "u32") for e in ins.vector(1)) if registers else ""
    d_values = ", ".join(ins.body.value(ins, e, "u32") for e in accumulators)
    scale_d = ins.src(3, "pred")
    descriptors = f"{a_descriptor}, {ins.src(2, 'u64')}, {str(registers).lower()}"
    flags_text = f"{scale_d}, {scale_a}, {scale_b}, {trans_a}, {trans_b}, {ins.line}"
    return (
        f"{{ WgmmaArg x{{{descriptors}, {flags_text}, {{{a_values}}}, {{{d_values}}}}}; "
        f"wgmma<{a}, {d}, {columns}>(t, {ins.line}, x); "
        + " ".join(f"set({ins.body.target(ins, e)}, x.d[{i}]);" for i, e in enumerate(accumulators))
        + f" {ins.body.accumulators[accumulators[0]]} = t.warp->wgmma_committed + 1; }}"
    )
