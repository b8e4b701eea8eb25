"""Reads what ptxas and nvdisasm print: notes, registers, and the loops of the machine code."""

import dataclasses
import re

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^\.(L_x_\d+):")
_BRANCH = re.compile(r"(@\S+ )?BRA\b.*`\(\.(L_x_\d+)\)")
_TEXT = re.compile(r"^\.text\.(\w+):$")


@dataclasses.dataclass(frozen=True)
class Loop:
    """One loop, innermost among those with matrix products.

    Attributes:
      body: its instructions, in the order in which they stand.
      straight: those of one round that takes every branch which skips a part: what a tile runs
        that needs no masking.
    """

    body: list[str]
    straight: list[str]


def count(instructions: list[str], pattern: str) -> int:
    """Instructions that match a regular expression."""
    return sum(bool(re.search(pattern, line)) for line in instructions)


def spills(instructions: list[str]) -> int:
    """Instructions that store registers to local memory or load them back."""
    return count(instructions, r"\b(STL|LDL)\b")


def events(loop: Loop) -> str:
    """Products issued, waits for products, exponentials and reduce-adds, one letter each.

    Q: both factors in shared memory; P: the left one in registers; 0, 1, 2: wait until so many
    are still running; e: exp2; a: add to memory. A product counts where its last part is issued.
    """
    letters = []
    for line in loop.straight:
        if "HGMMA" in line and "gsb0" in line:
            letters.append("P" if re.search(r"HGMMA\S* R\d+, R\d+", line) else "Q")
        elif wait := re.search(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d)", line):
            letters.append(wait[1])
        elif "MUFU.EX2" in line:
            letters.append("e")
        elif "UTMAREDG" in line:
            letters.append("a")
    return "".join(letters)


def registers(text: str) -> dict[str, int]:
    """Return the registers per thread of every kernel, as ptxas reports them."""
    found = re.findall(r"properties for (\w+)_mosaic_gpu_kernel\n.*\n.*Used (\d+) registers", text)
    return {name: int(number) for name, number in found}


def notes(text: str) -> list[str]:
    """Return the notes of ptxas about serialized matrix products and inserted waits."""
    return re.findall(r".*\(C75(?:1[0-4]|17)\).*", text)


def kernels(text: str) -> dict[str, list[Loop]]:
    """Return the main loops of every kernel in a dump, by the name of the kernel."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := _TEXT.match(line):
            lines = found.setdefault(header[1].removesuffix("_mosaic_gpu_kernel"), [])
        elif line.startswith("//----"):
            lines = []
        else:
            lines.append(line)
    return {name: main_loops(lines) for name, lines in found.items()}


def main_loops(lines: list[str]) -> list[Loop]:
    """Return the innermost loops with matrix products: one per copy of the consumer's code."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])

    def goes_back(at: int) -> int | None:
        branch = _BRANCH.match(instructions[at])
        return labels[branch[2]] if branch and labels[branch[2]] <= at else None

    spans = []
    for end in range(1, len(instructions)):
        begin = goes_back(end)
        # Behind the code stand the repeated tries of every wait, each a loop of its own and the
        # way back to where the wait was: that is no loop of the kernel.
        if begin is None or goes_back(end - 1) is not None:
            continue
        if count(instructions[begin:end], r"\bHG?MMA\b"):
            spans.append((begin, end))
    inner = [
        (begin, end)
        for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]

    def whole(begin: int, end: int) -> tuple[int, int]:
        """Return all of a loop to whose start a second way back leads past its first part."""
        products = count(instructions[begin:end], r"\bHMMA\b")
        around = [(b, e) for b, e in spans if b <= begin and end <= e]
        same = [(b, e) for b, e in around if count(instructions[b:e], r"\bHMMA\b") == products]
        return max(same, key=lambda span: span[1] - span[0]) if products else (begin, end)

    inner = [whole(begin, end) for begin, end in inner]
    return [
        Loop(instructions[begin : end + 1], _straight(instructions, labels, begin, end))
        for begin, end in inner
    ]


def _straight(instructions: list[str], labels: dict[str, int], begin: int, end: int) -> list[str]:
    path, at = [], begin
    while at <= end:
        path.append(instructions[at])
        branch = _BRANCH.match(instructions[at])
        target = labels[branch[2]] if branch else at
        at = target if at < target <= end else at + 1
    return path
