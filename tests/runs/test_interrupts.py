import os
import signal
import threading

import pytest

from bpo_fast.runs.interrupts import Interrupted, interruptible


def send(signum):
    os.kill(os.getpid(), signum)
    raise AssertionError("the block went on")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_block_and_the_handlers_come_back(signum):
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as stop, interruptible():
        send(signum)
    assert (stop.value.signum, stop.value.status) == (signum, 128 + signum)
    assert isinstance(stop.value, KeyboardInterrupt)
    assert signal.getsignal(signum) is before


class Swallows:
    """Its destructor is where a signal comes in, and where Python drops what is raised."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def renames():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        raise ImportError("numpy.core.multiarray failed to import") from None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("library", [Swallows, renames])
def test_a_signal_that_a_library_drops_or_renames_ends_the_block_all_the_same(library):
    with pytest.raises(Interrupted, match="SIGTERM"), interruptible():
        library()


def test_other_errors_pass_and_another_thread_is_left_alone():
    with pytest.raises(ValueError, match="mine"), interruptible():
        raise ValueError("mine")
    ran = []

    def work():
        with interruptible():
            ran.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [signal.getsignal(signal.SIGTERM)]
