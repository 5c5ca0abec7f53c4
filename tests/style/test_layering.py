"""Who may import whom. The direction is the architecture: see ARCHITECTURE.md."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "freezeframe"

EVERYWHERE = {"errors", "config", "_core"}
# A part may import the parts on its right. What is not listed here must be added on purpose.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "options": set(),
    "state": set(),
    "bus": set(),
    "backends": set(),
    "devices": {"bus", "state", "backends"},
    "startup": {"bus", "state", "backends"},
    "machine": {"startup", "devices", "bus", "state", "backends"},
    "store": {"state"},
    "control": {"machine", "store", "state", "backends", "options"},
    "proof": {"machine", "store", "state"},
    "api": {"control"},
    "client": set(),
    "images": set(),
    "cli": {"client", "api", "control", "proof", "images", "backends", "options"},
    "testing": {"store", "machine", "backends"},
    "__init__": {"machine", "store", "control", "proof", "images", "backends", "options"},
}


def _parts() -> list[str]:
    return sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})


def _imports(path: Path) -> set[str]:
    """Parts of the package that this module imports, at any depth of the code (TYPE_CHECKING blocks included)."""
    found: set[str] = set()
    inside = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join((*inside[: len(inside) - node.level], base)).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "freezeframe" else [base]
        for name in names:
            parts = name.split(".")
            if parts[0] == "freezeframe" and len(parts) > 1:
                found.add(parts[1])
    return found


def test_every_part_has_a_row() -> None:
    assert set(_parts()) - {"_core"} <= set(MAY_IMPORT)


@pytest.mark.parametrize("part", _parts())
def test_imports_go_one_way(part: str) -> None:
    allowed = MAY_IMPORT[part] | EVERYWHERE | {part}
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else list((PACKAGE / part).rglob("*.py"))
    known = set(MAY_IMPORT)
    for path in files:
        wrong = {name for name in _imports(path) if name in known} - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}, which is not below {part}"


def _crate_dependencies(name: str) -> set[str]:
    manifest = tomllib.loads((ROOT / "rust" / name / "Cargo.toml").read_text())
    return set(manifest.get("dependencies", {}))


CRATES_MAY_USE: dict[str, set[str]] = {
    "memory": set(),
    "vcpu": {"memory"},
    "x86": {"vcpu", "memory"},
    "kvm": {"vcpu", "memory"},
    "virtio": {"vcpu", "memory"},
    "py": {"kvm", "x86", "virtio", "vcpu", "memory"},
    "diff": {"x86", "kvm", "vcpu", "memory"},
}


@pytest.mark.parametrize("crate", sorted(path.parent.name for path in ROOT.glob("rust/*/Cargo.toml")))
def test_crates_go_one_way(crate: str) -> None:
    ours = _crate_dependencies(crate) & set(CRATES_MAY_USE)
    assert ours <= CRATES_MAY_USE[crate]


def test_only_one_crate_names_pyo3() -> None:
    naming = {
        path.parent.name
        for path in ROOT.glob("rust/*/Cargo.toml")
        if re.search(r"^pyo3|^pythonize", path.read_text(), re.MULTILINE)
    }
    assert naming == {"py"}
