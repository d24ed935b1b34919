"""A process for one call after another: Ctrl-C is not for it, and whatever a call raises can be told."""

import os
import signal
import sys

import pytest

from kaggle_utils.system.processes import Process, _call


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_a_process_ignores_an_interrupt_from_its_first_instant(capfd):
    before, process = signal.getsignal(signal.SIGINT), Process()
    try:
        future = process.submit(os.getpid)
        os.kill(process._process.pid, signal.SIGINT)
        assert future.result() == process._process.pid
    finally:
        process.end()
    assert signal.getsignal(signal.SIGINT) is before and not capfd.readouterr().err


def test_a_call_that_would_end_its_process_is_an_error_that_says_so():
    """Else who waits for it would take SystemExit for its own."""
    with pytest.raises(RuntimeError, match="SystemExit: no GPU"):
        _call(sys.exit, "no GPU")
