"""The command `mhc`, also as `python -m manifold_hc`."""

import sys

from manifold_hc.errors import MissingExtraError
from manifold_hc.extras import require_train


def main() -> None:
    """Run the command line; without the extra `train`, name it and exit with status 2."""
    try:
        require_train("the command mhc")
    except MissingExtraError as error:
        sys.exit(_refused(error))
    from manifold_hc import cli

    cli.main()


def _refused(error: MissingExtraError) -> int:
    print(f"mhc: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
