"""What a saved machine looks like outside of memory: the envelope of `vm.json` (`docs/formats/snapshot.md`)."""

from __future__ import annotations
