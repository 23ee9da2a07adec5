"""The command ``sdxl-runtime``, also as ``python -m app``: serves, or asks a running server how it is."""

import signal
import sys
from types import FrameType


def main() -> int:
    """Run what the command line asks for, and import no more than that needs.

    Returns:
        The exit code.
    """
    if sys.argv[1:2] == ["health"]:
        from app import health

        return health.main(sys.argv[2:])

    # Until the server has handlers of its own. The first process of a container would miss them otherwise, and Ctrl-C
    # would show a traceback.
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    from app.start import importing

    with importing("fastapi"):
        from app.main import main as serve

    return serve(sys.argv[1:])


def _stop(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
