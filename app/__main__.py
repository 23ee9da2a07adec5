"""The command ``sdxl-runtime``, also as ``python -m app``: serves, or asks a running server how it is."""

import sys


def main() -> int:
    """Run what the command line asks for, and import no more than that needs.

    Returns:
        The exit code.
    """
    if sys.argv[1:2] == ["health"]:
        from app import health

        return health.main(sys.argv[2:])

    from app.start import importing

    with importing("fastapi"):
        from app.main import main as serve

    return serve(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
