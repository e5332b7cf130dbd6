"""Become a program that dies with the process that asked for it. Run by path, so it imports nothing of ours.

Usage: ``python launch.py <pid of the parent> <signal at its death> <program> [argument ...]``

A small process of its own rather than code between fork and exec, which may deadlock where the parent has threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ask the kernel to end this process with its parent, restore the signal handlers, and run the program."""
    parent, death_signal, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0):
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit(f"the parent {parent} is gone already")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execvp(program[0], program)


if __name__ == "__main__":
    main()
