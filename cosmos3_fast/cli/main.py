"""`python -m cosmos3_fast`: the commands, and how each of them ends."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
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
from cosmos3_fast.files import remove_partials


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes `sys.argv`.

    Returns:
        0 on success, 1 where `verify` finds an error out of bounds, 2 for faulty arguments or
        inputs (one `error:` line on stderr).
    """
    out, err = _Output(sys.stdout), _Output(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return _run(argv)
        finally:
            out.finish()
            err.finish()


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
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


class _Output(io.TextIOBase):
    """stdout or stderr, or nothing where it is closed: what was done does not depend on it.

    What its encoding does not have (a file name need not be text) is written as escapes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def finish(self) -> None:
        """Write what is left now; Python would end with a status of its own if it could not."""
        self.flush()
        if self._stream is None and self._broken is not None:
            with contextlib.suppress(Exception):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, self._broken.fileno())
                os.close(nothing)

    _broken: Any = None

    def _try(self, method: str, *arguments: str) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except (OSError, ValueError):  # a closed pipe, a full disk, a closed file
            self._stream, self._broken = None, self._stream

    def isatty(self) -> bool:
        return bool(self._stream is not None and self._stream.isatty())

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("the stream is closed")
        return int(self._stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"


class _Stopped(BaseException):
    """SIGTERM or SIGHUP came: unwinds as an interrupt does, so that partial files go."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `_Stopped`; an ignored SIGHUP (nohup) stays ignored.

    Python asks for signals between two operations only, and one of torch may take minutes: a
    process that has not answered after `_PATIENCE` seconds is ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    answered = threading.Event()

    def stop(number: int, frame: object) -> None:
        answered.set()
        raise _Stopped(number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, stop)
    received, sent = os.pipe()
    os.set_blocking(sent, False)
    wakeup = signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
    _watched.append(os.getpid())
    watch = threading.Thread(target=_watch, args=(received, set(before), answered), daemon=True)
    watch.start()
    try:
        yield
    finally:
        _watched.pop()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(sent, bytes([_NO_SIGNAL]))  # not its end: a child may still have it open
        watch.join()
        os.close(sent)
        os.close(received)


_PATIENCE = 5.0
_NO_SIGNAL = 0
_watched: list[int] = []


def _watch(received: int, signals: set[signal.Signals], answered: threading.Event) -> None:
    """Read the numbers of signals as they come, and see that they are answered."""
    while (number := os.read(received, 1)) and number[0] != _NO_SIGNAL:
        if number[0] in signals and not answered.wait(_PATIENCE):
            remove_partials()
            name = signal.Signals(number[0]).name
            with contextlib.suppress(OSError):
                os.write(2, f"\nerror: stopped by {name}\n".encode())
            os._exit(128 + number[0])


def _leave_watch() -> None:
    """A child's signals are its own, and not told to its parent."""
    if _watched:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_watch)


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
