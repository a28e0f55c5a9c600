"""PTX instructions as statements of C++; ptx.h has what they do."""

from __future__ import annotations

import re
from typing import NamedTuple

TYPES = {
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f16": "float16",
    "bf16": "bfloat16",
    "f16x2": "float16x2",
    "bf16x2": "bfloat16x2",
    "f32": "float",
    "f64": "double",
    "pred": "bool",
}
REGISTERS = {8: "uint8_t", 16: "uint16_t", 32: "uint32_t", 64: "uint64_t"}
INTEGERS = {*REGISTERS.values(), *(f"int{bits}_t" for bits in REGISTERS)}
SPECIAL = {
    "%tid.x": "threadIdx.x",
    "%ntid.x": "blockDim.x",
    "%ctaid.x": "blockIdx.x",
    "%nctaid.x": "gridDim.x",
    "%laneid": "(threadIdx.x % 32)",
    "%cluster_ctarank": "kd::emulator::cluster_rank()",
    "%cluster_nctarank": "kd::emulator::cluster_size()",
    **{f"%{name}.{axis}": "0u" for name in ("tid", "ctaid") for axis in "yz"},
    **{f"%{name}.{axis}": "1u" for name in ("ntid", "nctaid") for axis in "yz"},
}
#: Those that take and give numbers of one type: <name>(operands...).
SAME_TYPE = {
    "add", "sub", "min", "max", "abs", "neg", "fma", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "tanh",
    "and", "or", "xor", "not", "copysign", "rem",
}  # fmt: skip
#: Functions of ptx.h, with the types of what they take; "" is the instruction's own.
FUNCTIONS = {
    "shl": ("shift_left", ["", "u32"]),
    "shr": ("shift_right", ["", "u32"]),
    "clz": ("leading_zeros", [""]),
    "popc": ("ones", [""]),
    "prmt": ("permute", ["b32", "b32", "b32"]),
    "lop3": ("logic", ["b32", "b32", "b32", "b32"]),
    "bfe": ("extract", ["", "u32", "u32"]),
}
#: Those of C++ that do the same; with -fwrapv for integers with a sign.
OPERATORS = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
#: Modifiers that change nothing here: rounding to nearest, caches, orders that barriers imply.
NEUTRAL = {
    "rn", "approx", "full", "uni", "sync", "aligned", "volatile", "weak", "relaxed", "acquire",
    "release", "gpu", "cta", "nc", "L1::no_allocate", "L1::evict_first", "L1::evict_last", "cs",
    "cg", "to", "wrap",
}  # fmt: skip


class Unknown(Exception):
    """An instruction that this knows nothing of."""


def name_of(symbol: str) -> str:
    """A name for C++."""
    return re.sub(r"\W", "_", symbol.lstrip("%$"))


def split_operands(text: str) -> list[str]:
    """Operands between commas, other than those in braces and brackets."""
    return [x.strip() for x in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if x.strip()]


def members(operand: str) -> list[str]:
    """Those of a vector, or the operand itself."""
    return split_operands(operand.strip("{} ")) if operand.startswith("{") else [operand]


class Instruction(NamedTuple):
    """An instruction's parts."""

    name: str
    modifiers: list[str]
    kinds: list[str]  # of numbers: keys of TYPES
    to: str  # the first operand
    operands: list[str]  # all others
    where: str  # a Where of C++

    @property
    def variant(self) -> str:
        """The one modifier that counts."""
        (variant,) = (x for x in self.modifiers if x not in NEUTRAL)
        return variant

    @property
    def space(self) -> str:
        """That of memory; without a name all of it but for parameters."""
        for space in ("global", "shared", "local", "param"):
            if space in self.modifiers or f"{space}::cta" in self.modifiers:
                return space
        return "generic"


class Instructions:
    """C++ for the instructions of one function; those of a kind of their own are methods."""

    def __init__(self, memory: dict[str, str]) -> None:
        """``memory``: addresses of symbols that are not the function's own."""
        self.memory = memory
        self.types: dict[str, str] = {}  # of registers, without their numbers

    def translate(self, opcode: str, operands: list[str], where: str) -> str:
        """C++ for one instruction."""
        name, *modifiers = opcode.split(".")
        kinds = [x for x in modifiers if x in TYPES]
        modifiers = [x for x in modifiers if x not in TYPES]
        i = Instruction(name, modifiers, kinds, (operands or [""])[0], operands[1:], where)
        if method := getattr(self, f"_{name}", None):
            return method(i)
        if name in FUNCTIONS:
            function, takes = FUNCTIONS[name]
            each = zip(i.operands, takes, strict=True)
            values = [self._read(x, kind or kinds[0]) for x, kind in each]
            return self._set(i.to, f"{function}({', '.join(values)})")
        if name in SAME_TYPE:
            return self._same_type(i)
        raise Unknown(name)

    # ---- Operands ----

    def _type_of(self, register: str) -> str:
        return self.types.get(register) or self.types.get(register.rstrip("0123456789"), "")

    def _bits(self, operand: str) -> str:
        if operand in SPECIAL:
            return SPECIAL[operand]
        if match := re.fullmatch(r"0([fFdD])([0-9A-Fa-f]+)", operand):
            return f"0x{match[2]}{'u' if match[1] in 'fF' else 'ull'}"
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", operand):
            return f"{operand.rstrip('U')}ll"
        if operand.startswith("!"):
            return f"!{self._bits(operand[1:])}"
        return self.memory.get(operand, name_of(operand))

    def _read(self, operand: str, kind: str, flush: bool = False) -> str:
        """An operand as a number of this type."""
        wanted, bits, held = TYPES[kind], self._bits(operand), self._type_of(operand)
        if held == wanted:
            value = bits
        elif wanted in INTEGERS and (held in INTEGERS or bits.endswith("ll")):
            value = f"({wanted}){bits}"
        else:
            value = f"as<{wanted}>({bits})"
        return f"flush({value})" if flush else value

    def _set(self, register: str, value: str, kind: str = "", flush: bool = False) -> str:
        """Sets a register to a value, whose type is known or not."""
        if register == "_":
            return ""
        if flush:
            value = f"flush({value})"
        held, given = self._type_of(register), TYPES.get(kind, "")
        if held and (held == given or {held, given} <= INTEGERS):
            return f"{name_of(register)} = {value};"
        return f"set({name_of(register)}, {value});"

    def _address(self, operand: str) -> str:
        base, _, offset = operand.strip("[] ").partition("+")
        return f"address({self._bits(base.strip())}, {offset.strip() or 0})"

    def _pointer(self, operand: str, space: str, size: str, where: str) -> str:
        return f"{space}({self._address(operand)}, {size}, {where})"

    # ---- Moves ----

    def _mov(self, i: Instruction) -> str:
        (source,), (kind,) = i.operands, i.kinds
        if i.to.startswith("{"):
            parts, value = members(i.to), self._read(source, kind)
            part = REGISTERS[int(kind[1:]) // len(parts)]
            return " ".join(
                self._set(x, f"part<{part}>({value}, {n})") for n, x in enumerate(parts)
            )
        if source.startswith("{"):
            parts = members(source)
            part = f"b{int(kind[1:]) // len(parts)}"
            return self._set(i.to, f"joined({', '.join(self._read(x, part) for x in parts)})")
        return self._set(i.to, self._read(source, kind), kind)

    def _selp(self, i: Instruction) -> str:
        chosen, other = (self._read(x, i.kinds[0]) for x in i.operands[:2])
        return self._set(i.to, f"{self._bits(i.operands[2])} ? {chosen} : {other}", i.kinds[0])

    def _cvta(self, i: Instruction) -> str:
        direction = "to" if "to" in i.modifiers else "from"
        return self._set(i.to, f"{direction}_{i.space}({self._bits(i.operands[0])})", "b64")

    def _createpolicy(self, i: Instruction) -> str:
        return self._set(i.to, "0", "b64")  # of a cache, which is not emulated

    def _ld(self, i: Instruction) -> str:
        registers, kind = members(i.to), i.kinds[0]
        size = f"{len(registers)} * sizeof({TYPES[kind]})"
        code = [f"const char* from = {self._pointer(i.operands[0], i.space, size, i.where)};"]
        # All are read before the first is set, which may hold the address.
        code += [
            f"const auto x{n} = load<{TYPES[kind]}>(from, {n});" for n in range(len(registers))
        ]
        return " ".join(code + [self._set(x, f"x{n}", kind) for n, x in enumerate(registers)])

    def _st(self, i: Instruction) -> str:
        values, kind = members(i.operands[0]), i.kinds[0]
        if "async" in i.modifiers:
            first, second = (self._read(x, "b64") for x in values)
            barrier = self._address(i.operands[1])
            return f"store_async({self._address(i.to)}, {first}, {second}, {barrier}, {i.where});"
        size = f"{len(values)} * sizeof({TYPES[kind]})"
        code = [f"char* to = {self._pointer(i.to, i.space, size, i.where)};"]
        code += [f"store(to, {n}, {self._read(x, kind)});" for n, x in enumerate(values)]
        return " ".join(code)

    # ---- Arithmetic ----

    def _same_type(self, i: Instruction) -> str:
        kind = i.kinds[-1]
        flush = "ftz" in i.modifiers and kind == "f32"
        variant = "".join(x for x in i.modifiers if x not in NEUTRAL | {"ftz"})
        if "approx" in i.modifiers:
            variant = "approx"
        values = [self._read(x, kind, flush) for x in i.operands]
        value = f"{i.name}_{variant}({', '.join(values)})"
        if i.name in OPERATORS and not variant:
            value = f" {OPERATORS[i.name]} ".join(values)
        return self._set(i.to, value, kind, flush)

    def _setp(self, i: Instruction) -> str:
        compare, *rest = [x for x in i.modifiers if x not in NEUTRAL]
        kind = i.kinds[0]
        x, y = (self._read(each, kind, "ftz" in rest) for each in i.operands[:2])
        result = f"compare_{compare}({x}, {y})"
        if kind.endswith("x2"):
            first, second = i.to.split("|")
            return (
                f"const auto both = {result}; "
                f"{self._set(first, 'both.first')} {self._set(second, 'both.second')}"
            )
        for combination, operator in (("and", "&&"), ("or", "||"), ("xor", "!=")):
            if combination in rest:
                result = f"({result} {operator} {self._bits(i.operands[2])})"
        return self._set(i.to, result, "pred")

    def _cvt(self, i: Instruction) -> str:
        to, source = i.kinds
        flush = "ftz" in i.modifiers
        rounding = [x for x in i.modifiers if x not in ("ftz", "sat")] or ["rn"]
        if "sat" in i.modifiers and TYPES[to] not in INTEGERS:
            raise Unknown("saturation")
        if to.endswith("x2"):
            high, low = (self._read(x, "f32") for x in i.operands)
            return self._set(i.to, f"pack<{TYPES[to]}>({low}, {high})")
        value = self._read(i.operands[0], source, flush and source == "f32")
        value = f"convert<{TYPES[to]}, kRound_{rounding[0]}>({value})"
        return self._set(i.to, value, to, flush and to == "f32")

    def _mul(self, i: Instruction) -> str:
        kind = i.kinds[0]
        flush = "ftz" in i.modifiers
        x, y = (self._read(each, kind, flush) for each in i.operands)
        if kind in ("f32", "f64"):
            return self._set(i.to, f"{x} * {y}", kind, flush)
        return self._set(i.to, f"multiply_{i.variant}({x}, {y})")

    def _mad(self, i: Instruction) -> str:
        x, y = (self._read(each, i.kinds[0]) for each in i.operands[:2])
        product = f"multiply_{i.variant}({x}, {y})"
        return self._set(i.to, f"sum_with({product}, {self._bits(i.operands[2])})")

    def _div(self, i: Instruction) -> str:
        kind, approximate = i.kinds[0], {"full", "approx"} & set(i.modifiers)
        flush = kind == "f32" and "ftz" in i.modifiers
        x, y = (self._read(each, kind, flush) for each in i.operands)
        return self._set(i.to, f"div_{'approx' if approximate else ''}({x}, {y})", kind, flush)

    def _shf(self, i: Instruction) -> str:
        values = ", ".join(self._read(x, "b32") for x in i.operands)
        return self._set(i.to, f"funnel_{i.variant}({values})")

    # ---- Control ----

    def _bra(self, i: Instruction) -> str:
        return f"goto {name_of(i.to)};"

    def _ret(self, i: Instruction) -> str:
        return "return;"

    _exit = _ret

    def _call(self, i: Instruction) -> str:
        match = re.fullmatch(
            r"(?:\(([$\w]+)\), )?([$\w]+)(?:, \((.*)\))?", ", ".join([i.to, *i.operands])
        )
        if not match:
            raise Unknown("call")
        parameters = [x.strip() for x in (match[3] or "").split(",") if x.strip()]
        arguments = ", ".join(name_of(x) for x in [match[1], *parameters] if x)
        return f"{name_of(match[2])}({arguments});"

    # ---- Threads together ----

    def _bar(self, i: Instruction) -> str:
        if i.modifiers[0] == "warp":
            return f"kd::emulator::sync_warp({self._read(i.to, 'b32')}, {i.where});"
        if i.to != "0":
            raise Unknown("a barrier of its own")
        threads = self._read(i.operands[0], "u32") if i.operands else "blockDim.x"
        return f"sync_threads({threads}, {i.where});"

    def _barrier(self, i: Instruction) -> str:
        if i.modifiers[0] != "cluster":
            return self._bar(i)
        if i.modifiers[1] == "wait":
            return f"kd::emulator::cluster_wait({i.where});"
        if "relaxed" not in i.modifiers:
            raise Unknown("barrier.cluster")
        return f"kd::emulator::cluster_arrive({i.where});"

    def _shfl(self, i: Instruction) -> str:
        values = ", ".join(self._read(x, "b32") for x in i.operands)
        to, _, inside = i.to.partition("|")
        return (
            f"const auto [value, inside] = shuffle_{i.variant}({values}, {i.where}); "
            f"{self._set(to, 'value')} {self._set(inside or '_', 'inside')}"
        )

    def _vote(self, i: Instruction) -> str:
        x, mask = self._read(i.operands[0], "pred"), self._read(i.operands[1], "b32")
        return self._set(i.to, f"vote_{i.variant}({x}, {mask}, {i.where})")

    def _redux(self, i: Instruction) -> str:
        x, mask = self._read(i.operands[0], i.kinds[0]), self._read(i.operands[1], "b32")
        step = f"[](auto x, auto y) {{ return {i.variant}_(x, y); }}"
        return self._set(i.to, f"reduce({x}, {mask}, {step}, {i.where})")

    def _ldmatrix(self, i: Instruction) -> str:
        if i.modifiers != ["sync", "aligned", "m8n8", "x4", "shared"]:
            raise Unknown("ldmatrix")
        code = [f"const uint64_t row = {self._address(i.operands[0])};"]
        parts = members(i.to)
        for n in range(len(parts)):
            code.append(f"const uint32_t x{n} = matrix_part(row, {n}, {i.where});")
        return " ".join(code + [self._set(x, f"x{n}", "b32") for n, x in enumerate(parts)])

    def _mapa(self, i: Instruction) -> str:
        address, rank = map(self._bits, i.operands)
        return self._set(i.to, f"address_in_cluster({address}, {rank})")

    def _mbarrier(self, i: Instruction) -> str:
        what = i.modifiers[0]
        place, number = i.operands if what != "init" else (i.to, *i.operands)
        barrier = f"(uint64_t*){self._pointer(place, 'shared', '8', i.where)}"
        arguments = f"{barrier}, {self._read(number, 'u32')}, {i.where}"
        if what == "try_wait":
            return f"kd::emulator::mbarrier_wait({arguments}); {self._set(i.to, 'true')}"
        return f"kd::emulator::mbarrier_{what}({arguments});"

    def _fence(self, i: Instruction) -> str:
        if i.modifiers[0] != "mbarrier_init":
            raise Unknown("fence")
        return "kd::emulator::fence_mbarrier_init();"

    def _cp(self, i: Instruction) -> str:
        if i.modifiers == ["async", "wait_all"]:
            return "kd::cuda::wait_for_copies();"
        if i.modifiers == ["async", "bulk", "prefetch", "L2", "global"]:
            size = self._read(i.operands[0], "u32")
            from_ = self._pointer(i.to, "global", "16", i.where)
            return f"kd::cuda::fetch_into_cache({from_}, {size}, {i.where});"
        source, size = i.operands
        if size != "16":
            raise Unknown("cp")
        to = self._pointer(i.to, "shared", "16", i.where)
        return (
            f"kd::cuda::copy_16({to}, {self._pointer(source, 'global', '16', i.where)}, {i.where});"
        )
