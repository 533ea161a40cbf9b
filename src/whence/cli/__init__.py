"""The command line: explain, methods, prove, train. Thin: it checks what was asked, calls the verbs and prints.

Exit codes: 0; 2 for input that cannot be served (three lines on standard error); 130 after Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point ``whence``. Always ends by SystemExit."""
    from .commands import app

    code = run(app, arguments)
    if code == 130:  # a second Ctrl-C while Python ends would be told as an error of it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def run(app: object, arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    import typer

    from ..errors import WhenceError

    command = typer.main.get_command(app)  # type: ignore[arg-type]
    try:
        result = command.main(list(sys.argv[1:] if arguments is None else arguments), "whence", standalone_mode=False)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
    except WhenceError as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except typer.Exit as end:
        code = int(end.exit_code)
    except BrokenPipeError:
        # The reader of a pipe went away (`whence methods | head`); Python would complain when it flushes at exit.
        sys.stderr.close()
        return 0
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error: an unknown option, a missing value
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    if code == 130:
        print("stopped; nothing half-written was left", file=sys.stderr)
    return code
