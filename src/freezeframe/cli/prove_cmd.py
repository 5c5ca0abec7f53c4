"""`freezeframe prove`: a snapshot run twice, on the interpreter and on the translator, and compared to the bit."""

from __future__ import annotations

import argparse
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from freezeframe.proof import Parting, Proof

_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9}
_ENDED = {
    "poweroff": "the guest switched itself off",
    "reset": "the guest asked for a reset",
    "asleep": "every vCPU is halted and no timer runs: only input would wake the guest",
}


def add_prove(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Restores a snapshot twice, on the interpreter and on the translator, and compares CPU, devices and memory "
        "while both run. Time is the count of instructions, chance follows from the seed, disks are overlays that "
        "are thrown away: snapshot and disks stay as they are. Exit status 0: equal. 1: not; then it says after "
        "which block."
    )
    parser.add_argument("snapshot", metavar="SNAPSHOT", help="the snapshot's directory")
    parser.add_argument(
        "--instructions",
        type=_count,
        default=10**9,
        metavar="N",
        help="how many, of all vCPUs together; with suffix k, M or G (default: 1G)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="for random numbers and the wall clock")
    parser.add_argument(
        "--every", type=_count, metavar="N", help="compare every so many instructions (default: 16 times in all)"
    )
    parser.add_argument("--inputs", metavar="FILE", help="a log of console input to repeat")
    parser.add_argument(
        "--disk", action="append", default=[], type=_disk, metavar="ID=PATH", help="another file in place of a disk"
    )
    parser.add_argument(
        "--disk-check", choices=("on", "off"), default="on", help="refuse a disk that changed since (default: on)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.set_defaults(run=run_prove)


def run_prove(args: argparse.Namespace) -> int:
    from freezeframe.proof import prove, read_inputs

    proof = prove(
        args.snapshot,
        args.instructions,
        seed=args.seed,
        every=args.every,
        inputs=read_inputs(args.inputs) if args.inputs else (),
        disks=dict(args.disk),
        disk_check=args.disk_check == "on",
        progress=_progress,
    )
    if os.isatty(2):
        sys.stderr.write("\r\033[K")
    if args.json:
        import json

        print(json.dumps(proof.to_json()))
    else:
        print(report(proof))
    return 0 if proof.same else 1


def report(proof: Proof) -> str:
    """The outcome for people."""
    lines = [
        f"{'run':<4} {'executed by':<12} {'seed':>6} {'CPU s':>9} {'million/s':>10}",
        *(
            f"{name:<4} {side.tier:<12} {side.seed:>6} {seconds:>9.2f} "
            f"{proof.instructions / 1e6 / seconds if seconds else 0:>10.0f}"
            for name, side, seconds in zip("AB", proof.sides, proof.seconds, strict=True)
        ),
        "",
        f"{'instructions':>15}  {'cpu':<12}  {'devices':<12}  {'memory':<12}",
        *(
            f"{point.at:>15,}  {point.digests.cpu[:12]}  {point.digests.devices[:12]}  {point.digests.memory[:12]}"
            for point in proof.checkpoints
        ),
        "",
    ]
    slept = f"{proof.slept_ns / 1e9:.3f} s of the guest's time asleep"
    if proof.parting is not None:
        return "\n".join([*lines, *_parting(proof.parting)])
    if proof.ended is not None:
        lines.append(f"ended early: {_ENDED[proof.ended]}")
    return "\n".join([*lines, f"equal: {proof.instructions:,} instructions, {slept}"])


def _parting(parting: Parting) -> list[str]:
    if parting.at == 0:
        lines = ["DIFFERENT before the first instruction"]
    else:
        lines = [f"DIFFERENT after instruction {parting.at:,}; equal before this block was executed, or begun:"]
        lines += [
            f"  {step.number:>15,}  vCPU {step.vcpu}  {step.address:#018x}  {step.code.hex():<22}  {step.text}"
            for step in parting.block
        ]
    lines.append("")
    width = max((len(difference.where) for difference in parting.differences), default=0)
    lines.append(f"  {'':<{width}}  A / B")
    for found in parting.differences:
        lines.append(f"  {found.where:<{width}}  {found.first} / {found.second}")
    if parting.more:
        lines.append(f"  and {parting.more} more")
    return lines


def _count(text: str) -> int:
    digits, factor = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"not a count: {text!r} (a whole number, with an optional suffix k, M or G)")
    return int(digits) * factor


def _disk(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
        raise argparse.ArgumentTypeError(f"not ID=PATH: {text!r}")
    return name, path


def _progress(line: str) -> None:
    """Talk goes to stderr: one line that is overwritten, on a terminal only."""
    if os.isatty(2):
        sys.stderr.write(f"\r\033[K{line} ")
        sys.stderr.flush()
