"""`python -m fisherlab`, and `torchrun -m fisherlab`."""

import sys

from fisherlab.extras import named


def main() -> None:
    """The entry point `fisherlab`."""
    try:
        with named():
            from fisherlab.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    run()


if __name__ == "__main__":
    main()
