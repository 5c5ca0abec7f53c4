"""Errors on the terminal, as Cloud Hypervisor's programs print them (cloud-hypervisor/src/lib.rs)."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def print_chain(program: str, texts: Sequence[str]) -> None:
    """One error, or several with the outermost first, on stderr."""
    if len(texts) == 1:
        lines = [f"Error: {program} exited with the following error:", f"  {texts[0]}"]
    else:
        lines = [f"Error: {program} exited with the following chain of errors:"]
        lines += [f"  {index}: {text}" for index, text in enumerate(texts)]
    sys.stderr.write("\n".join([*lines, ""]))
    sys.stderr.flush()
