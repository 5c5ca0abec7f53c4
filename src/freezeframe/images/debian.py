"""Debian packages without root: apt and dpkg-deb with directories of our own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

from freezeframe.errors import FreezeframeError, NotFound
from freezeframe.images.cache import Progress, cache_dir, silent

if TYPE_CHECKING:
    from pathlib import Path

_LISTS_MAX_AGE_S = 24 * 3600
_TOOLS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "sfdisk": "fdisk",
    "mke2fs": "e2fsprogs",
}


def tool(name: str) -> str:
    """Path of a host program; NotFound names the Debian package that has it."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        package = _TOOLS.get(name, name)
        raise NotFound(
            f"{name} is missing on this machine: install Debian's package {package} (apt-get install {package})"
        )
    return path


def run(*argv: str, cwd: Path | None = None, stdin: str | None = None) -> str:
    """Runs a host program and gives its standard output; a failure carries what it said."""
    done = subprocess.run(
        [tool(argv[0]), *argv[1:]],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
    )
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-800:]
        raise FreezeframeError(f"{argv[0]} failed with status {done.returncode}: {said}")
    return done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}


def _apt(*argv: str, cwd: Path | None = None) -> str:
    state = cache_dir("apt")
    (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (state / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state,
        "Dir::Cache::archives": state / "archives",
        "APT::Sandbox::User": "",
    }
    settings = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return run("apt-get", *settings, "-q", *argv, cwd=cwd)


def _update_lists(progress: Progress) -> None:
    stamp = cache_dir("apt") / "updated"
    if stamp.exists() and time.time() - stamp.stat().st_mtime < _LISTS_MAX_AGE_S:
        return
    progress("reading Debian's package lists")
    _apt("update")
    stamp.touch()


def package(name: str, progress: Progress = silent) -> Path:
    """The newest ``.deb`` of a Debian package for this machine's release, downloaded once."""
    _update_lists(progress)
    where = cache_dir("debs")
    uris = _apt("download", "--print-uris", name).split("\n")
    fields = next((line.split() for line in uris if line.startswith("'")), None)
    if fields is None or len(fields) < 3:
        raise NotFound(f"Debian has no package {name} for this machine's release")
    path = where / fields[1]
    if not path.exists() or path.stat().st_size != int(fields[2]):
        progress(f"downloading {name} ({int(fields[2]) / 1e6:.1f} MB)")
        _apt("download", name, cwd=where)
        if not path.exists():
            raise FreezeframeError(f"apt-get download {name} left no {path.name}")
    return path


def dependency(name: str, prefix: str, progress: Progress = silent) -> str:
    """The first dependency of package ``name`` that starts with ``prefix`` (metapackages point at real ones)."""
    deb = str(package(name, progress))
    fields = run("dpkg-deb", "--field", deb, "Depends") + " " + run("dpkg-deb", "--field", deb, "Pre-Depends")
    for word in fields.replace(",", " ").replace("|", " ").split():
        if word.startswith(prefix):
            return word
    raise NotFound(f"Debian's package {name} does not depend on any {prefix}…")


def unpack(deb: Path, into: Path) -> None:
    """Unpacks a package's files below ``into``, running none of its scripts."""
    into.mkdir(parents=True, exist_ok=True)
    run("dpkg-deb", "--extract", str(deb), str(into))
