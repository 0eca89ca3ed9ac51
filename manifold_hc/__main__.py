"""Entry point of the command `mhc` and of `python -m manifold_hc`."""

import sys

from manifold_hc.errors import MissingExtraError
from manifold_hc.extras import require_train


def main() -> None:
    """Run the command line; exit with status 2 if the extra `train` is not installed."""
    try:
        require_train("the command mhc")
    except MissingExtraError as error:
        print(f"mhc: error: {error}", file=sys.stderr)
        sys.exit(2)
    from manifold_hc import cli

    cli.main()


if __name__ == "__main__":
    main()
