"""Turns PTX into C++ that runs in the emulator of csrc/tests: a statement an instruction.

    python translate.py kernels.ptx kernels.cpp

What nvcc and Triton compile then runs without a GPU, with the barriers, shuffles and stores of the
compiled code. ptx.h has what the instructions do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from instructions import TYPES, Instructions, Unknown, name_of, split_operands


def statements(text: str) -> Iterator[tuple[int, str]]:
    """Statements, labels and the braces of blocks, each with its line."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    text = re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    token = re.compile(r"\s*(?:([{}])|([$\w]+:)(?!:)|((?:[^;{}]|\{[^{};]*\})+);)")
    at = line = 0
    while match := token.match(text, at):
        start = match.start(match.lastindex or 0)
        line += text.count("\n", at, start)
        yield line + 1, " ".join(match[match.lastindex or 0].split())
        line += text.count("\n", start, match.end())
        at = match.end()
    if text[at:].strip():
        raise Unknown(f"line {line + 1}: {text[at : at + 80].strip()!r}")


class Body(Instructions):
    """Translates the statements of one function."""

    def __init__(self, memory: dict[str, str]) -> None:
        """As of Instructions."""
        super().__init__(memory)
        self.lines: list[str] = []

    def _declare(self, text: str) -> None:
        kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()  # type: ignore[union-attr]
        register = TYPES[kind]
        for name in map(str.strip, names.split(",")):
            if match := re.fullmatch(r"%(\w+)<(\d+)>", name):
                self.types["%" + match[1]] = register
                each = ", ".join(f"{match[1]}{i}" for i in range(int(match[2])))
            else:
                self.types[name] = register
                each = name_of(name)
            self.lines.append(f"{register} {each};")

    def _allocate(self, text: str) -> None:
        match = re.fullmatch(
            r"\.(?:param|local)(?: \.align (\d+))? \.b(\d+) ([$\w]+)(?:\[(\d+)\])?", text
        )
        if not match:
            raise Unknown(text)
        size = int(match[4] or 1) * int(match[2]) // 8
        self.lines.append(f"alignas({match[1] or 8}) char {name_of(match[3])}[{size}];")

    def add(self, line: int, text: str) -> None:
        """A statement, or a brace or label."""
        if text in "{}":
            self.lines.append(text)
        elif text.endswith(":") and " " not in text:
            self.lines.append(f"{name_of(text[:-1])}:;")
        elif text.startswith(".reg "):
            self._declare(text)
        elif text.startswith((".param ", ".local ")):
            self._allocate(text)
        elif not text.startswith(".pragma"):
            guard = ""
            if match := re.match(r"@(!?)(%?\w+) ", text):
                guard, text = f"if ({match[1]}{name_of(match[2])}) ", text[match.end() :]
            opcode, _, operands = text.partition(" ")
            try:
                code = self.translate(opcode, split_operands(operands), f"KD_AT({line})")
            except (Unknown, KeyError, IndexError, ValueError) as error:
                raise Unknown(f"line {line}: {text} ({error!r})") from error
            self.lines.append(f"{guard}{{ {code} }}")


FUNCTION = re.compile(
    r"^(?:\.visible |\.weak )?\.(?P<kind>entry|func)\s*(?:\((?P<returned>[^)]*)\)\s*)?"
    r"(?P<name>[$\w]+)\s*(?P<taken>\(.*?\))?[^{};()]*(?P<opening>[{;])",
    re.MULTILINE | re.DOTALL,
)


def parameters(text: str | None) -> list[tuple[str, int]]:
    """Names and bytes."""
    found = re.findall(
        r"\.param [^,()]*?\.[bufs](\d+) (?:[^,()]* )?([$\w]+)(?:\[(\d+)\])?\s*(?=[,)]|$)",
        text or "",
    )
    return [(name_of(name), int(count or 1) * int(bits) // 8) for bits, name, count in found]


def end_of_block(text: str, start: int) -> int:
    """Beyond the brace that closes the one at ``start``."""
    depth = 0
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return start + match.end()
    raise Unknown("a function without an end")


def translate(text: str, file: str) -> str:
    """C++ with every function of the PTX."""
    if match := re.search(r"^\.shared .*", text, re.MULTILINE):
        raise Unknown(match[0])
    dynamic = re.findall(r"^\.extern \.shared [^;]*?([$\w]+)\[\];", text, re.MULTILINE)
    memory = dict.fromkeys(dynamic, "kSharedMemory")
    declarations, definitions = [], []
    for match in FUNCTION.finditer(text):
        if match["opening"] == ";":
            continue
        start = match.start("opening")
        body, line = Body(memory), text.count("\n", 0, start)
        for number, statement in statements(text[start : end_of_block(text, start)]):
            body.add(line + number, statement)
        results, arguments = parameters(match["returned"]), parameters(match["taken"])
        passed = [f"char* {x}" for x, _ in results] + [f"const char* {x}" for x, _ in arguments]
        name = name_of(match["name"])
        symbol = f"{name}_body" if match["kind"] == "entry" else name
        head = f"static __attribute__((noinline)) void {symbol}({', '.join(passed)})"
        declarations.append(head + ";")
        definitions.append("\n".join([head, *body.lines]))
        if match["kind"] == "entry":
            definitions.append(entry(name, symbol, [size for _, size in arguments]))
    head = f'#include "ptx.h"\n#define KD_AT(line) Where{{"{file}", line}}'
    return "\n\n".join([head, *declarations, *definitions]) + "\n"


def entry(name: str, body: str, sizes: list[int]) -> str:
    """A kernel of one struct is as in C++; one of several arguments comes with its launch."""
    ready = "keep_subnormals();"
    if len(sizes) == 1:
        return f'extern "C" void {name}(Bytes<{sizes[0]}> x) {{ {ready} {body}(x.bytes); }}'
    each = ", ".join(f"addresses[{i}]" for i in range(len(sizes)))
    return f"""static void {name}(const void* x) {{
{ready}
const auto addresses = static_cast<const char* const*>(x);
{body}({each});
}}
KD_LAUNCH({name})"""


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(translate(source.read_text(), source.name))
