"""Finding and describing the first block after which two runs differ.

A stop in the middle of a block changes how it is executed (the translator leaves the rest of it to the interpreter), so
a wrong block shows only in runs that go through it at one go. Therefore each trial is a new pair of runs that were
stopped at the same counts as before, and then at just one more.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from freezeframe.proof.compare import Pair, Run
    from freezeframe.proof.run import Replay

# Parts that a wide gap is cut into at once; below NARROW each stop would hide too much of what happens between.
PARTS = 16
NARROW = 4096
# What is shown at most.
FIELDS = 40
CHUNKS = 8
RUNS_PER_CHUNK = 8
BYTES_PER_RUN = 16
# A block has at most so many instructions (rust/x86, decode.rs).
BLOCK_MAX = 64


class Difference:
    """A field of the state, or bytes of memory (`memory 0x…`), and what each run has there."""

    __slots__ = ("first", "second", "where")

    def __init__(self, where: str, first: str, second: str) -> None:
        self.where = where
        self.first = first
        self.second = second

    def __repr__(self) -> str:
        return f"<Difference {self.where}: {self.first} / {self.second}>"

    def to_json(self) -> dict[str, str]:
        return {"where": self.where, "first": self.first, "second": self.second}


class Step:
    """An instruction of the block, as the first run executed it: its number, vCPU, address, bytes and text."""

    __slots__ = ("address", "code", "number", "text", "vcpu")

    def __init__(self, number: int, vcpu: int, address: int, code: bytes, text: str) -> None:
        self.number = number
        self.vcpu = vcpu
        self.address = address
        self.code = code
        self.text = text

    def __repr__(self) -> str:
        return f"<Step {self.number} vCPU {self.vcpu} {self.address:#x} {self.text}>"

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "vcpu": self.vcpu,
            "address": self.address,
            "code": self.code.hex(),
            "text": self.text,
        }


class Parting:
    """`at`: the first count at which the runs differ; `block`: what they executed last until then.

    `differences`: what is different there, shortened where it is much (`more` says how many fields and chunks of memory
    are left out). At 0 the machines differ before their first instruction.
    """

    __slots__ = ("at", "block", "differences", "more")

    def __init__(self, at: int, block: Sequence[Step], differences: Sequence[Difference], more: int) -> None:
        self.at = at
        self.block = tuple(block)
        self.differences = tuple(differences)
        self.more = more

    def __repr__(self) -> str:
        return f"<Parting at {self.at}: {len(self.differences)} differences>"

    def to_json(self) -> dict[str, Any]:
        return {
            "at": self.at,
            "block": [step.to_json() for step in self.block],
            "differences": [difference.to_json() for difference in self.differences],
            "more": self.more,
        }


def find(pairs: Callable[[], Pair], equal: Sequence[int], differs: int, say: Callable[[str], None]) -> Parting:
    """`equal`: ascending counts at which the runs were stopped and found equal; `differs`: the next one."""
    stops = list(equal)
    low, high = (stops[-1] if stops else 0), differs
    while high - low > NARROW:
        found = _cut(pairs, stops, low, high)
        if found is None:
            break
        stops, low, high = found
        say(f"between {low} and {high}")
    while high - low > 1:
        middle = (low + high) // 2
        with _at(pairs, stops, middle) as pair:
            if pair.same() is None:
                high = middle
            else:
                low = middle
        say(f"between {low} and {high}")
    with _at(pairs, stops, high) as pair:
        pair.same()
        differences, more = _differences(*pair.runs)
    return Parting(high, _block(pairs, high), differences, more)


def _at(pairs: Callable[[], Pair], stops: Sequence[int], count: int) -> Pair:
    """New runs, stopped where they were before, and at `count`."""
    pair = pairs()
    try:
        for stop in [*stops, count]:
            pair.run_to(stop)
    except BaseException:
        pair.__exit__()
        raise
    return pair


def _cut(pairs: Callable[[], Pair], stops: list[int], low: int, high: int) -> tuple[list[int], int, int] | None:
    """The gap cut into parts by one pair of runs; None when so many stops make the difference go away."""
    step = -(-(high - low) // PARTS)
    stops = list(stops)
    with _at(pairs, stops, low) as pair:
        for count in [*range(low + step, high, step), high]:
            pair.run_to(count)
            if pair.same() is None:
                return stops, low, count
            stops.append(count)
            low = count
    return None


def _block(pairs: Callable[[], Pair], end: int) -> list[Step]:
    """The last instructions of the first run up to `end` that followed each other without a jump."""
    steps: list[Step] = []
    pair = pairs()
    with pair:
        run = pair.runs[0]
        run.run_to(max(0, end - BLOCK_MAX))
        while run.replay.instructions < end and not run.over:
            step = _step(run.replay, run.run_to)
            last = steps[-1] if steps else None
            if last is None or step.vcpu != last.vcpu or step.address != last.address + len(last.code):
                steps = []
            steps.append(step)
    return steps


def _step(replay: Replay, run_to: Callable[[int], None]) -> Step:
    machine = replay.machine
    number = replay.instructions
    before = machine.turn()[1]
    # Which vCPU is next is known afterwards: each might wake, or be halted.
    listings = [machine.listing(vcpu)[:1] for vcpu in range(len(before))]
    run_to(number + 1)
    moved = [vcpu for vcpu, (a, b) in enumerate(zip(before, machine.turn()[1], strict=True)) if a != b]
    vcpu = moved[0] if moved else machine.turn()[0]
    address, code, text = listings[vcpu][0] if listings[vcpu] else (0, b"", "(not mapped)")
    return Step(number, vcpu, address, code, text)


def _differences(one: Run, other: Run) -> tuple[list[Difference], int]:
    first, second = one.replay, other.replay
    facts = [
        Difference(name, str(a), str(b))
        for name, a, b in (
            ("instructions", first.instructions, second.instructions),
            ("ended", first.ended, second.ended),
            ("error", one.failed or "", other.failed or ""),
        )
        if a != b
    ]
    fields = facts + list(_fields("", first.state(), second.state()))
    more = max(0, len(fields) - FIELDS)
    chunks = first.machine.memory_differences(second.machine, 1 << 20)
    more += max(0, len(chunks) - CHUNKS)
    found = fields[:FIELDS]
    for address, size in chunks[:CHUNKS]:
        a, b = (replay.machine.memory.read(address, size) for replay in (first, second))
        runs = list(_byte_runs(a, b))
        more += max(0, len(runs) - RUNS_PER_CHUNK)
        for start, end in runs[:RUNS_PER_CHUNK]:
            found.append(Difference(f"memory {address + start:#x}", a[start:end].hex(), b[start:end].hex()))
    return found, more


def _fields(where: str, a: object, b: object) -> Iterator[Difference]:
    """Leaves of two trees that differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted({*map(str, a), *map(str, b)}):  # pyright: ignore[reportUnknownArgumentType]
            yield from _fields(f"{where}.{name}" if where else name, a.get(name), b.get(name))  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):  # pyright: ignore[reportUnknownArgumentType]
        for number, (x, y) in enumerate(zip(a, b, strict=True)):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            yield from _fields(f"{where}[{number}]", x, y)
    elif a != b:
        yield Difference(where, _shown(a), _shown(b))


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _byte_runs(a: bytes, b: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of bytes that differ, at most BYTES_PER_RUN long."""
    start = None
    for at in range(len(a) + 1):
        differs = at < len(a) and a[at] != b[at]
        if start is not None and (not differs or at - start == BYTES_PER_RUN):
            yield start, at
            start = None
        if differs and start is None:
            start = at
