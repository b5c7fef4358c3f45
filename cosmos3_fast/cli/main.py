"""`python -m cosmos3_fast`: the commands, and how each of them ends."""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from safetensors import SafetensorError

from cosmos3_fast.cli.decode import add_decode
from cosmos3_fast.cli.encode import add_encode
from cosmos3_fast.cli.info import add_info
from cosmos3_fast.cli.options import UserError
from cosmos3_fast.cli.prepare import add_prepare
from cosmos3_fast.cli.verify import add_verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.

    Returns:
        0 on success, 1 where `verify` finds an error out of bounds, 2 for faulty arguments or
        inputs (one `error:` line on stderr).
    """
    parser = _parser()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name need not be text
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # --help and, below, _Parser.error
        return int(stop.code or 0)
    try:
        with _stoppable(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return args.run(args)
    except _Stopped as stop:
        print(f"error: stopped by {stop.signal.name}", file=sys.stderr)
        return 128 + stop.signal
    except _FAULTS as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


# What faulty inputs raise somewhere below: sizes that overflow or do not fit memory included.
_FAULTS = (
    UserError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    ImportError,
    OSError,
    SafetensorError,
)


class _Stopped(BaseException):
    """SIGTERM or SIGHUP came: unwinds as an interrupt does, so that partial files go."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `_Stopped`; an ignored SIGHUP (nohup) stays ignored."""

    def stop(number: int, frame: object) -> None:
        raise _Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m cosmos3_fast",
        description="Conditioning image to NVIDIA Cosmos3 latents.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for add in (add_prepare, add_decode, add_encode, add_verify, add_info):
        add(commands)
    return parser
