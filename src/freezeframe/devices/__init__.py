"""Cold devices: registers that a guest touches less than a thousand times a second, whole in Python.

Every device has `read(offset, size)`, `write(offset, size, value)` and `state()`. Its one constructor takes the state:
`State()` for a machine that is switched on, a checked one for a machine that is restored.
"""

from __future__ import annotations
