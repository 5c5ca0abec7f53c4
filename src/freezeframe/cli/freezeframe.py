"""`freezeframe VERB`: what Cloud Hypervisor's commands have no word for. Results on stdout, talk on stderr.

Exit status: 0 ok, 1 failed (`prove`: the runs differ), 2 usage, and the `exit_code` of the error that ended it (10 not
found, 11 busy, 12 damaged, 13 incompatible).
"""

from __future__ import annotations

import argparse
import sys

from freezeframe.errors import FreezeframeError, chain_messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def _version(args: argparse.Namespace) -> int:
    import platform

    from freezeframe import __version__
    from freezeframe._core import build_profile

    facts = {
        "freezeframe": __version__,
        "compatible": "Cloud Hypervisor v53.0",
        "core": build_profile(),
        "python": platform.python_version(),
        "host": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if args.json:
        from json import dumps

        print(dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:<12} {value}")
    return 0


def _parser() -> argparse.ArgumentParser:
    from freezeframe.cli import image_cmd, prove_cmd, run_cmd

    parser = argparse.ArgumentParser(prog="freezeframe", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    version = verbs.add_parser("version", help="versions of this program and of what it stands on")
    version.add_argument("--json", action="store_true", help="one JSON document")
    version.set_defaults(run=_version)
    run_cmd.add_run(verbs.add_parser("run", help="run a machine in the foreground until it ends"))
    image_cmd.add_image(verbs.add_parser("image", help="make guest disks from Debian packages"))
    image_cmd.add_kernel(verbs.add_parser("kernel", help="get Debian's cloud kernel with an initramfs for it"))
    prove_cmd.add_prove(verbs.add_parser("prove", help="show that a snapshot runs the same each time, to the bit"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with these arguments, or the process' own; the exit status."""
    args = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except (FreezeframeError, OSError) as error:
        first, *causes = chain_messages(error)
        print(f"freezeframe {args.verb}: {first}", file=sys.stderr)
        for cause in causes:
            print(f"  because: {cause}", file=sys.stderr)
        return error.exit_code if isinstance(error, FreezeframeError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
