"""Walks the machine code of a CUDA kernel as one thread would, and counts what its warp issues.

Integers, predicates, kernel parameters and given constants in memory are computed, so that loops take their true number
of turns and branches on sizes go the true way; floating-point numbers (but the reciprocals of integer divisions) and
other memory are not. A branch on something unknown is not taken, which
is what slow paths expect, and is counted as a guess.
"""

from __future__ import annotations

import functools
import re
import struct
from collections import Counter
from dataclasses import dataclass, field

Value = int | None  # of 32 bits, unsigned; None where it is not known
_MASK = 0xFFFFFFFF
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;", re.MULTILINE)
_COMPARISONS = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


class UnknownInstructionError(ValueError):
    """An instruction that decides where the walk goes and is not understood."""


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    guard: str | None
    opcode: tuple[str, ...]
    operands: tuple[str, ...]


@dataclass
class Walk:
    """What a warp issued."""

    issued: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)
    guesses: int = 0

    @property
    def double(self) -> int:
        """Arithmetic in float64."""
        return sum(count for name, count in self.opcodes.items() if name.startswith(("DFMA", "DMUL", "DADD")))

    @property
    def tensor(self) -> int:
        """Matrix instructions."""
        return sum(count for name, count in self.opcodes.items() if name.startswith("HMMA"))


def parse(text: str) -> list[Instruction]:
    """The instructions of one kernel from ``cuobjdump -sass``."""
    found = []
    for match in _LINE.finditer(text):
        operands = tuple(part.strip().replace(".reuse", "") for part in re.split(r",(?![^\[]*\])", match[4]) if part)
        found.append(Instruction(int(match[1], 16), match[2], tuple(match[3].split(".")), operands))
    return found


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


@functools.cache
def is_predicate(text: str) -> bool:
    """Whether an operand is a predicate, negated or not."""
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


@functools.cache
def operand(text: str) -> tuple[str, str, str, int]:
    """Sign, kind, prefix and number of an operand that is an integer."""
    text = re.sub(r"\.(64|U32|H0_H0)\b", "", text)
    sign = text[0] if text[0] in "~|" or re.match(r"-[^0-9]", text) else ""
    text = text.strip("~|") if sign != "-" else text[1:]
    if text in ("RZ", "URZ", "SRZ"):
        return sign, "number", "", 0
    if match := re.fullmatch(r"(U?R)(\d+)", text):
        return sign, "register", match[1], int(match[2])
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+|RZ)\]", text):
        return sign, "constant", "", int(match[1].replace("RZ", "0"), 16)
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return sign, "number", "", int(text, 16)
    return sign, "unknown", "", 0


class Machine:
    """The registers of one thread."""

    def __init__(
        self, constants: bytes, thread: int, block: tuple[int, int], device: dict[int, int] | None = None
    ) -> None:
        self.constants = constants
        self.device = device or {}  # words of device memory that are known, by address
        self.special = {"SR_TID.X": thread, "SR_CTAID.X": block[0], "SR_CTAID.Y": block[1], "SR_LANEID": thread % 32}
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, bool | None] = {}
        self.memory: dict[int, Value] = {}  # local memory, where spilled loop counters go

    def read(self, text: str, high: bool = False) -> Value:
        """An operand; ``high``: the upper word of a pair."""
        sign, kind, prefix, number = operand(text)
        value: Value = None
        if kind == "register":
            value = self.registers.get(f"{prefix}{number + high}")
        elif kind == "constant":
            offset = number + 4 * high
            if offset + 4 <= len(self.constants):
                value = int.from_bytes(self.constants[offset : offset + 4], "little")
        elif kind == "number":
            value = (number >> 32 if high else number) & _MASK
        if value is None or not sign:
            return value
        return {"-": -value, "~": ~value, "|": abs(_signed(value))}[sign] & _MASK

    def pair(self, text: str) -> Value:
        low, high = self.read(text), self.read(text, True)
        return None if low is None or high is None else low | high << 32

    def write(self, text: str, value: Value, wide: bool = False) -> None:
        _, kind, prefix, number = operand(text)
        if kind != "register":
            return
        self.registers[f"{prefix}{number}"] = None if value is None else value & _MASK
        if wide:
            self.registers[f"{prefix}{number + 1}"] = None if value is None else value >> 32 & _MASK

    def test(self, text: str) -> bool | None:
        negative, name = text.startswith("!"), text.lstrip("!")
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return None if value is None else value != negative

    def set_predicate(self, text: str, value: bool | None) -> None:
        if text not in ("PT", "UPT"):
            self.predicates[text] = value


def _sum(machine: Machine, terms: list[str], carries: list[str], extended: bool) -> Value:
    values = [machine.read(term) for term in terms]
    # What is subtracted comes as complement and one: less nothing carries.
    values = [1 << 32 if v == 0 and term.startswith("-") else v for term, v in zip(terms, values)]
    if extended:
        values += [None if (bit := machine.test(carry)) is None else int(bit) for carry in carries]
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _lut(values: list[Value], table: int) -> Value:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        # An unknown operand may not matter: a & 0.
        return 0 if table == 0xC0 and 0 in values[:2] else None
    result = 0
    for index in range(8):
        if table >> index & 1:
            term = _MASK
            for value, bit in zip(known, (4, 2, 1)):
                term &= value if index & bit else ~value
            result |= term & _MASK
    return result


def _integer(machine: Machine, name: str, modifiers: tuple[str, ...], operands: tuple[str, ...]) -> bool:
    """Execute integer arithmetic; False where the instruction is none that is understood."""
    target, sources = operands[0], list(operands[1:])
    read = machine.read
    if name in ("MOV", "UMOV", "R2UR", "VIADD") or (name == "IMAD" and "MOV" in modifiers):
        terms = [s for s in sources if not is_predicate(s)]
        values = [read(s) for s in (terms if name == "VIADD" else terms[-1:])]
        if name in ("MOV", "UMOV"):
            values = [read(terms[0])]
        machine.write(target, None if None in values else sum(values))  # type: ignore[arg-type]
        return True
    if name in ("IMAD", "UIMAD"):
        carries = [s for s in sources if is_predicate(s)]
        a, b, c = [s for s in sources if not is_predicate(s)][:3]
        wide, high = "WIDE" in modifiers, "HI" in modifiers
        x, y, z = read(a), read(b), machine.pair(c) if wide or high else read(c)
        if high:
            z = read(c)
        value: Value = None
        if (x == 0 or y == 0) and z is not None:
            value = z
        elif x is not None and y is not None and z is not None:
            if (wide or high) and "U32" not in modifiers:
                x, y = _signed(x), _signed(y)
            product = x * y + ((z << 32) if high else z)
            value = product >> 32 if high else product
        if "X" in modifiers and value is not None:
            bit = machine.test(carries[-1]) if carries else False
            value = None if bit is None else value + bit
        machine.write(target, None if value is None else value & (1 << 64) - 1, wide)
        return True
    if name in ("IADD3", "UIADD3", "IADD", "UIADD"):
        outputs = []
        while sources and is_predicate(sources[0]):
            outputs.append(sources.pop(0))
        carries = [s for s in sources if is_predicate(s)]
        total = _sum(machine, [s for s in sources if not is_predicate(s)], carries, "X" in modifiers)
        for index, output in enumerate(outputs):
            machine.set_predicate(output, None if total is None else bool(index == 0 and total >> 32))
        machine.write(target, total)
        return True
    if name in ("LEA", "ULEA"):
        output = sources.pop(0) if is_predicate(sources[0]) else None
        carries = [s for s in sources if is_predicate(s)]
        terms = [s for s in sources if not is_predicate(s)]
        shift = read(terms[-1])
        a, b = read(terms[0]), read(terms[1])
        if "HI" in modifiers:
            top = read(terms[2]) if len(terms) > 3 else 0
            if "SX32" in modifiers:
                top = None if a is None else (_MASK if a >> 31 else 0)
            a = None if a is None or top is None or shift is None else ((a | top << 32) >> (32 - shift)) & _MASK
        elif a is not None and shift is not None:
            a = a << shift & _MASK
        value = None if a is None or b is None else a + b
        if "X" in modifiers and value is not None and carries:
            bit = machine.test(carries[-1])
            value = None if bit is None else value + bit
        if output:
            machine.set_predicate(output, None if value is None else bool(value >> 32))
        machine.write(target, value)
        return True
    if name in ("LOP3", "ULOP3"):
        output = None
        if is_predicate(target):
            output, target = target, sources.pop(0)
        terms = [s for s in sources if not is_predicate(s)]
        value = _lut([read(s) for s in terms[:3]], read(terms[3]) or 0)
        if output:
            machine.set_predicate(output, None if value is None else value != 0)
        machine.write(target, value)
        return True
    if name in ("SHF", "USHF"):
        low, shift, high_word = (read(s) for s in sources[:3])
        value = None
        if shift is not None and low is not None and high_word is not None:
            shift = min(shift, 63 if "64" in "".join(modifiers) else 32)
            if "L" in modifiers:
                joined = (high_word << 32 | low) << shift
                value = joined >> 32 if "HI" in modifiers else joined
            elif "HI" in modifiers:
                joined = high_word << 32 | low
                value = (_signed(high_word) if "S32" in modifiers or "S64" in modifiers else high_word) >> shift
                if "U64" in modifiers and "R" in modifiers:
                    value = joined >> shift >> 32
            else:
                value = (high_word << 32 | low) >> shift
        machine.write(target, value)
        return True
    if name in ("SEL", "USEL"):
        bit = machine.test(sources[2])
        machine.write(target, None if bit is None else read(sources[0 if bit else 1]))
        return True
    if name in ("IMNMX", "VIMNMX", "UIMNMX"):
        a, b, bit = read(sources[0]), read(sources[1]), machine.test(sources[2])
        if a is None or b is None or bit is None:
            machine.write(target, None)
            return True
        x, y = (a, b) if "U32" in modifiers else (_signed(a), _signed(b))
        machine.write(target, min(x, y) if bit else max(x, y))
        return True
    if name == "IABS":
        machine.write(target, read(f"|{sources[0]}|"))
        return True
    return False


def _bits(number: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


def _reciprocal(machine: Machine, name: str, modifiers: tuple[str, ...], operands: tuple[str, ...]) -> bool:
    """The floating-point steps of an integer division; False where the instruction is none of them.

    What follows them corrects a reciprocal that is a little off, so that any rounding does here.
    """
    source = machine.read(operands[1]) if len(operands) > 1 else None
    if name == "I2F" and "RP" in modifiers:
        machine.write(operands[0], None if source is None else _bits(float(source)))
    elif name == "MUFU" and modifiers == ("RCP",):
        number = None if source is None else struct.unpack("<f", struct.pack("<I", source))[0]
        machine.write(operands[0], _bits(1.0 / number) if number else None)
    elif name == "F2I" and "NTZ" in modifiers:
        machine.write(operands[0], None if source is None else int(struct.unpack("<f", struct.pack("<I", source))[0]))
    else:
        return False
    return True


def _load(machine: Machine, modifiers: tuple[str, ...], operands: tuple[str, ...]) -> None:
    """Of one or more words of device memory."""
    words = 4 if "128" in modifiers else (2 if "64" in modifiers else 1)
    match = re.search(r"\[(R\w+)\.64(?:\+(-?0x[0-9a-f]+))?\]$", operands[1])
    start = machine.pair(match[1]) if match else None
    offset = int(match[2], 16) if match and match[2] else 0
    _, kind, prefix, number = operand(operands[0])
    for i in range(words if kind == "register" else 0):
        address = None if start is None else start + offset + 4 * i
        machine.registers[f"{prefix}{number + i}"] = None if address is None else machine.device.get(address)


def _compare(machine: Machine, modifiers: tuple[str, ...], operands: tuple[str, ...]) -> None:
    first, second, a_text, b_text, other = operands[:5]
    a, b, before = machine.read(a_text), machine.read(b_text), machine.test(other)
    compare = next(_COMPARISONS[m] for m in modifiers if m in _COMPARISONS)
    value: bool | None = None
    if a is not None and b is not None:
        x, y = (a, b) if "U32" in modifiers else (_signed(a), _signed(b))
        value = compare(x, y)
        if "EX" in modifiers:  # the upper words of a comparison of 64 bits; the lower ones' verdict counts in a tie
            value = machine.test(operands[5]) if x == y else value
    conjunction = "AND" in modifiers
    for output, verdict in ((first, value), (second, None if value is None else not value)):
        if before is not None and before != conjunction:
            result: bool | None = before
        elif verdict is not None and verdict != conjunction:
            result = verdict
        else:
            result = None if verdict is None or before is None else verdict
        machine.set_predicate(output, result)


def _predicate_logic(machine: Machine, operands: tuple[str, ...]) -> None:
    bits = [machine.test(p) for p in operands[2:5]]
    for output, table in zip(operands[:2], operands[5:7]):
        value: bool | None = None
        if None not in bits:
            index = sum(4 >> i for i, bit in enumerate(bits) if bit)
            value = bool(int(table, 16) >> index & 1)
        machine.set_predicate(output, value)


def _execute(machine: Machine, instruction: Instruction) -> None:
    name, modifiers, operands = instruction.opcode[0], instruction.opcode[1:], instruction.operands
    if not operands:
        return
    if name in ("ISETP", "UISETP"):
        _compare(machine, modifiers, operands)
    elif name in ("PLOP3", "UPLOP3"):
        _predicate_logic(machine, operands)
    elif name in ("S2R", "S2UR"):
        machine.write(operands[0], machine.special.get(operands[1]))
    elif name == "CS2R":
        machine.write(operands[0], machine.read(operands[1]), "32" not in modifiers)
    elif name == "P2R":  # of the predicates into a register; the first one alone is followed
        bit = machine.test("P0") if [machine.read(text) for text in operands[2:4]] == [0, 1] else None
        machine.write(operands[0], None if bit is None else int(bit))
    elif name in ("LDC", "ULDC"):
        wide = "64" in modifiers
        value = machine.pair(operands[1]) if wide else machine.read(operands[1])
        machine.write(operands[0], value and value & 0xFF if "U8" in modifiers else value, wide)
    elif name in ("STL", "LDL"):
        match = re.search(r"\[\w+(?:\+(0x[0-9a-f]+))?\]", " ".join(operands))
        place = int(match[1], 16) if match and match[1] else 0
        if name == "STL":
            machine.memory[place] = machine.read(operands[1])
        else:
            machine.write(operands[0], machine.memory.get(place))
    elif name == "LDG":
        _load(machine, modifiers, operands)
    elif _reciprocal(machine, name, modifiers, operands):
        pass
    elif name in ("FCHK", "SYNCS"):  # a division needs no slow path; what is waited for has come
        for text in operands:
            if is_predicate(text) and text not in ("PT", "UPT", "!PT", "!UPT"):
                machine.set_predicate(text, name == "SYNCS")
                break
    elif not _integer(machine, name, modifiers, operands) and not name.startswith(("ST", "RED", "BAR", "HMMA")):
        wide = 4 if "128" in modifiers else (2 if "64" in modifiers else 1)
        for text in operands[:2]:
            if is_predicate(text):
                machine.set_predicate(text, None)
        _, kind, prefix, number = operand(operands[0])
        for i in range(wide if kind == "register" else 0):
            machine.registers[f"{prefix}{number + i}"] = None
    if name == "HMMA":
        for i in range(4):
            machine.registers[f"R{int(operands[0][1:]) + i}"] = None


def walk(code: list[Instruction], machine: Machine, limit: int = 2_000_000) -> Walk:
    """Run from the first instruction to the end of the thread."""
    index_of = {instruction.address: index for index, instruction in enumerate(code)}
    result, index, calls = Walk(), 0, []
    while result.issued < limit:
        instruction = code[index]
        name, operands = instruction.opcode[0], instruction.operands
        result.issued += 1
        result.opcodes[".".join(instruction.opcode)] += 1
        index += 1
        active = machine.test(instruction.guard) if instruction.guard else True
        if name in ("BRA", "CALL", "BRX"):
            conditions = [active, *(machine.test(text) for text in operands[:-1] if is_predicate(text))]
            if "DIV" in instruction.opcode:
                continue
            if None in conditions:
                result.guesses += 1
            elif all(conditions):
                if name == "BRX":
                    raise UnknownInstructionError("an indirect branch")
                if name == "CALL":
                    calls.append(index)
                index = index_of[int(operands[-1], 16)]
        elif name == "RET" and active:
            index = calls.pop()
        elif name == "EXIT" and active:
            return result
        elif active is not False:
            _execute(machine, instruction)
            if active is None and operands:  # it may not have happened
                machine.write(operands[0], None)
    raise UnknownInstructionError(f"more than {limit} instructions: a loop whose end is not understood")
