"""Proof that a snapshot's runs are the same: two of them, on two ways of executing, compared to the bit."""

from __future__ import annotations

from freezeframe.proof.compare import Checkpoint, Proof, Side, prove
from freezeframe.proof.inputs import Input, read_inputs, write_inputs
from freezeframe.proof.parting import Difference, Parting, Step
from freezeframe.proof.run import Replay, replay

__all__ = [
    "Checkpoint",
    "Difference",
    "Input",
    "Parting",
    "Proof",
    "Replay",
    "Side",
    "Step",
    "prove",
    "read_inputs",
    "replay",
    "write_inputs",
]
