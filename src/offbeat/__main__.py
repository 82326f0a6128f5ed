"""``offbeat`` and ``python -m offbeat``: the command line, or how to get it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command that ``sys.argv`` describes and exit with its status."""
    try:
        from .cli import main as command
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in ("tyro", "rich", "docstring_parser"):
            raise
        print(f"offbeat's command line needs {missing.name}: pip install 'offbeat[cli]'", file=sys.stderr)
        sys.exit(1)
    sys.exit(command(sys.argv[1:]))


if __name__ == "__main__":
    main()
