"""A process of its own for one call after another: an executor of Python's library, whose process can be killed.

Whoever hands out the calls works with `concurrent.futures` alone, and so with any other executor as well, such as a
worker of a Dask cluster. Calls are functions of modules, because their names travel."""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

teller: ContextVar[Callable[[float], None]] = ContextVar("teller")  # to whom a call of this thread tells its share


def tell(share: float) -> None:
    """Say, inside a call, which share of its work is done (0 to 1); who waits for the call can read it."""
    teller.get(lambda share: None)(share)


class Process:
    """A process that computes one call after another, until it is ended. It ignores Ctrl-C, which this process gets
    too, and ends with this process. Raises OSError when the system has no room for it."""

    lost = paused = False  # a future tells when the process has ended

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._share = context.RawValue("d", 0.0)  # in shared memory: a pipe could break in the middle of a message
        self._pool = ProcessPoolExecutor(1, context, _begin, (self._share,))
        self._process: Any = None

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """Begin a call. Its future has `BrokenExecutor` when the process ends before it. Raises OSError when the system
        cannot start the process."""
        self._share.value = 0.0
        try:
            with _ignoring_interrupts():
                future = self._pool.submit(_call, function, *arguments)
        except BrokenExecutor as error:  # it ended between two calls
            future = Future()
            future.set_exception(error)
            return future
        # Python has no public way to it: `ProcessPoolExecutor.kill_workers` of 3.14 takes it from there, too.
        self._process = self._process or next(iter(self._pool._processes.values()))
        return future

    @property
    def share(self) -> float:
        """The share of the call that is done, as it has told."""
        return self._share.value

    def end(self) -> int | None:
        """End the process, whatever it does, and return its exit status; None when it was never started."""
        if self._process is not None:
            self._process.kill()
        self._pool.shutdown(cancel_futures=True)
        return self._process and self._process.exitcode

    def release(self) -> None:
        """End the process because nothing is left to do."""
        self.end()


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """A process that is started in here ignores Ctrl-C from its first instant: it inherits that. Only the main thread
    can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin(share: Any) -> None:
    """Prepare a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "fork" in multiprocessing.get_all_start_methods():
        # numcodecs makes a lock, of which Python would tell the user as leaked when this process is killed.
        multiprocessing.set_start_method("fork", force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    teller.set(lambda done: setattr(share, "value", done))


def _end_with_parent() -> None:
    """End at once when the process that waits for results has ended."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _call(function: Callable, *arguments: Any) -> Any:
    """Call, and raise what can be sent to another process: an error that cannot be loaded there would break it, and
    SystemExit would mean nothing there."""
    try:
        return function(*arguments)
    except BaseException as error:
        try:
            sent = pickle.loads(pickle.dumps(error))
        except Exception:
            sent = None
        if isinstance(sent, Exception):
            raise
        raise RuntimeError("".join(traceback.format_exception_only(error)).strip()) from error
