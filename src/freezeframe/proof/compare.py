"""Two runs of one snapshot side by side: equal digests on the way and at the end, or the block where they part."""

from __future__ import annotations

import threading
import time

from freezeframe.errors import EngineError, Refused
from freezeframe.proof.parting import Parting, find
from freezeframe.proof.run import Digests, Replay, replay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike
    from typing import Any

    from freezeframe.proof.inputs import Input
    from freezeframe.proof.run import Tier

    AnyPath = str | PathLike[str]
    Progress = Callable[[str], None]

DEFAULT_INSTRUCTIONS = 1_000_000_000
CHECKPOINTS = 16
# Comparing takes a few ms: more often than this it would be what takes the time.
EVERY_MIN = 100_000


class Side:
    """One of the two runs: what executes, what stands for chance, and a bit of RAM to spoil.

    `disturb`: (count, guest address): after so many instructions the lowest bit of that byte is flipped, for seeing
    what a difference looks like.
    """

    __slots__ = ("disturb", "seed", "tier")

    def __init__(self, tier: Tier, seed: int = 0, disturb: tuple[int, int] | None = None) -> None:
        self.tier: Tier = tier
        self.seed = seed
        self.disturb = disturb

    def __repr__(self) -> str:
        return f"<Side {self.tier} seed={self.seed}>"

    def to_json(self) -> dict[str, Any]:
        return {"tier": self.tier, "seed": self.seed, "disturb": list(self.disturb) if self.disturb else None}


class Checkpoint:
    """A count at which both runs had these digests."""

    __slots__ = ("at", "digests")

    def __init__(self, at: int, digests: Digests) -> None:
        self.at = at
        self.digests = digests

    def __repr__(self) -> str:
        return f"<Checkpoint {self.at} {self.digests!r}>"

    def to_json(self) -> dict[str, Any]:
        return {"at": self.at, **self.digests.to_json()}


class Proof:
    """What came out. `same`: the runs were equal at every checkpoint; else `parting` says where they are not any more.

    `instructions`: how many both executed; fewer than `asked` when the guest ended by itself (`ended`: `poweroff`,
    `reset`, or `asleep`: nothing but input would wake it). `seconds`: of CPU time that each run took.
    """

    __slots__ = ("asked", "checkpoints", "ended", "instructions", "parting", "seconds", "sides", "slept_ns")

    def __init__(
        self,
        *,
        asked: int,
        instructions: int,
        slept_ns: int,
        ended: str | None,
        sides: tuple[Side, Side],
        seconds: tuple[float, float],
        checkpoints: Sequence[Checkpoint],
        parting: Parting | None,
    ) -> None:
        self.asked = asked
        self.instructions = instructions
        self.slept_ns = slept_ns
        self.ended = ended
        self.sides = sides
        self.seconds = seconds
        self.checkpoints = tuple(checkpoints)
        self.parting = parting

    @property
    def same(self) -> bool:
        return self.parting is None

    def __repr__(self) -> str:
        what = "same" if self.parting is None else f"parting at {self.parting.at}"
        return f"<Proof {what}, {self.instructions} instructions>"

    def to_json(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "asked": self.asked,
            "instructions": self.instructions,
            "slept_ns": self.slept_ns,
            "ended": self.ended,
            "runs": [
                {**side.to_json(), "seconds": round(seconds, 3)}
                for side, seconds in zip(self.sides, self.seconds, strict=True)
            ],
            "checkpoints": [checkpoint.to_json() for checkpoint in self.checkpoints],
            "parting": None if self.parting is None else self.parting.to_json(),
        }


class Run:
    """One side's machine, the seconds of CPU time that it took, and why its engine cannot go on (`failed`)."""

    def __init__(self, made: Replay, side: Side) -> None:
        self.replay = made
        self.side = side
        self.seconds = 0.0
        self.failed: EngineError | None = None

    @property
    def over(self) -> bool:
        """It will not come further."""
        return self.failed is not None or self.replay.ended is not None

    def run_to(self, count: int) -> None:
        """As far as it gets."""
        if self.failed is not None:
            return
        began = time.thread_time()
        try:
            if self.side.disturb is not None and self.replay.instructions <= self.side.disturb[0] < count:
                self.replay.run_to(self.side.disturb[0])
                self._disturb(self.side.disturb[1])
            self.replay.run_to(count)
        except EngineError as error:
            self.failed = error
        finally:
            self.seconds += time.thread_time() - began

    def _disturb(self, address: int) -> None:
        memory = self.replay.machine.memory
        memory.write(address, bytes([memory.read(address, 1)[0] ^ 1]))

    def close(self) -> None:
        self.replay.close()


class Pair:
    """Both runs at one count. A context manager."""

    def __init__(self, make: Callable[[Side], Replay], sides: tuple[Side, Side]) -> None:
        first = Run(make(sides[0]), sides[0])
        try:
            self.runs = (first, Run(make(sides[1]), sides[1]))
        except BaseException:
            first.close()
            raise

    def run_to(self, count: int) -> None:
        """Both, each on a thread of its own; raises what one of them raised, the first one's error first.

        An `EngineError` that only one of them meets is a difference; one that both meet at the same count is raised.
        """
        errors: list[BaseException | None] = [None, None]

        def work(n: int) -> None:
            try:
                self.runs[n].run_to(count)
            except BaseException as error:
                errors[n] = error

        threads = [threading.Thread(target=work, args=(n,), name=f"run-{n}", daemon=True) for n in (0, 1)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                # A signal that comes just before an endless wait is not seen until it ends (CPython's lock_acquire).
                while thread.is_alive():
                    thread.join(0.1)
        except BaseException:
            for run in self.runs:
                run.replay.interrupt()
            for thread in threads:
                thread.join()
            raise
        for error in errors:
            if error is not None:
                raise error
        first, second = self.runs
        counts = [run.replay.instructions for run in self.runs]
        if first.failed is not None and second.failed is not None and counts[0] == counts[1]:
            first.failed.hint = f"the {first.side.tier}, after {counts[0]} instructions; the other run as well"
            raise first.failed

    def same(self, *, afresh: bool = False) -> Digests | None:
        """The digests of both; None when they differ. `afresh`: see `Replay.digests`."""
        a, b = (run.replay for run in self.runs)
        failed = any(run.failed is not None for run in self.runs)
        if failed or (a.instructions, a.ended) != (b.instructions, b.ended):
            # Of each, for whoever asks where they differ.
            a.digests(), b.digests()
            return None
        mine, other = a.digests(afresh=afresh), b.digests(afresh=afresh)
        return mine if mine == other else None

    def __enter__(self) -> Pair:  # noqa: PYI034 - typing.Self costs an import
        return self

    def __exit__(self, *_: object) -> None:
        for run in self.runs:
            run.close()


def prove(
    snapshot: AnyPath,
    instructions: int = DEFAULT_INSTRUCTIONS,
    *,
    seed: int = 0,
    sides: tuple[Side, Side] | None = None,
    every: int | None = None,
    inputs: Sequence[Input] = (),
    disks: Mapping[str, AnyPath] | None = None,
    disk_check: bool = True,
    progress: Progress | None = None,
) -> Proof:
    """Restores a snapshot twice, on the interpreter and on the translator, and compares them as they run.

    Time is the count of instructions, `seed` stands for random numbers and the wall clock, `inputs` come at their
    counts, disks are overlays that are thrown away: neither snapshot nor disks are changed. CPU, devices and memory are
    compared at the start, `every` so many instructions and at the end; when they differ, runs from the snapshot find
    the first block after which they do. `sides`: other runs to compare.

    Raises what a restore raises; from the runs also `Damaged`, and `EngineError` when neither can go on. One engine
    that cannot where the other can is a difference.
    """
    if instructions < 1:
        raise Refused(f"{instructions} instructions: at least 1")
    every = max(EVERY_MIN, -(-instructions // CHECKPOINTS)) if every is None else every
    if every < 1:
        raise Refused(f"a comparison every {every} instructions: at least 1")
    both = sides or (Side("interpreter", seed), Side("translator", seed))

    def make(side: Side) -> Replay:
        return replay(snapshot, seed=side.seed, tier=side.tier, inputs=inputs, disks=disks, disk_check=disk_check)

    say = progress or (lambda _: None)
    with Pair(make, both) as pair:
        checkpoints, parted_at = _follow(pair, [0, *range(every, instructions, every), instructions], say)
        first = pair.runs[0].replay
        facts: dict[str, Any] = {
            "asked": instructions,
            "instructions": first.instructions,
            "slept_ns": first.machine.slept_ns,
            "ended": first.ended,
            "sides": both,
            "seconds": (pair.runs[0].seconds, pair.runs[1].seconds),
            "checkpoints": checkpoints,
        }
    parting = None
    if parted_at is not None:
        say(f"they differ after {parted_at} instructions: looking for the place")
        parting = find(lambda: Pair(make, both), [c.at for c in checkpoints], parted_at, say)
    return Proof(**facts, parting=parting)


def _follow(pair: Pair, counts: Sequence[int], say: Progress) -> tuple[list[Checkpoint], int | None]:
    """The counts at which both runs were equal, and the first at which they were not."""
    checkpoints: list[Checkpoint] = []
    for count in counts:
        pair.run_to(count)
        last = count == counts[-1] or pair.runs[0].over
        digests = pair.same(afresh=last)
        if digests is None:
            return checkpoints, count
        checkpoints.append(Checkpoint(pair.runs[0].replay.instructions, digests))
        say(f"{checkpoints[-1].at} instructions: equal")
        if last:
            break
    return checkpoints, None
