"""Makes `snapshot-v1`, the snapshot that every later program must restore. Run once, when a format version is frozen.

python tests/golden/make_snapshot.py tests/golden/snapshot-v1
"""

from __future__ import annotations

import os
import sys

from freezeframe.testing import small_snapshot

if __name__ == "__main__":
    os.mkdir(sys.argv[1])
    small_snapshot.snapshot(sys.argv[1])
