"""Whether a process has ended, for tests that start some."""

import time

import psutil


def is_gone(pid: int, within_s: float = 60.0) -> bool:
    """Wait until a process has ended, which takes a while on a busy machine; False if it has not.

    One that ended and that nobody has waited for counts as gone.
    """
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False
