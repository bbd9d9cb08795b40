"""Signals that end a command: an interrupt, a request to terminate and a lost terminal end it alike. Standard library only."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = "qf: interrupted; run the same command to go on"
EXIT_CODE = 130


def leave(number: int, frame: FrameType | None) -> None:
    """Handle a signal by ending at once. As after kill -9, all that was complete stays."""
    shown = "\x1b[?25h" if os.isatty(2) else ""  # the cursor, which a live display hides
    os.write(2, f"{shown}{INTERRUPTED}\n".encode())
    os._exit(EXIT_CODE)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal by KeyboardInterrupt, or by `leave` if it is the second one.

    Within an import it also leaves: modules in other languages turn an exception there into something else."""
    for later in SIGNALS:
        handle(later, leave)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave(number, frame)
        frame = frame.f_back
    raise KeyboardInterrupt


DEFAULTS = (signal.SIG_DFL, signal.default_int_handler, interrupt, leave)


def handle(number: int, handler: object) -> None:
    """Set the handler of a signal. A signal that is ignored, as by nohup, stays so."""
    if signal.getsignal(number) in DEFAULTS:
        signal.signal(number, handler)  # type: ignore[arg-type]


def take_signals(handler: object) -> None:
    """Set the handler of all signals that end a command."""
    for number in SIGNALS:
        handle(number, handler)
