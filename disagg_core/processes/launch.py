"""Become a program that dies with the process that asked for it. Run by path, so it imports nothing of ours.

The program and all that descend from it carry a mark of their tree in the environment, by which they are found when
the processes between are gone and they have sessions of their own.

Usage: ``python launch.py <pid of the parent> <signal at its death> <program> [argument ...]``

A small process of its own rather than code between fork and exec, which may deadlock where the parent has threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
TREES = "DRAFTLINE_TREES"
"""The marks of the trees that a process is part of, outermost first, each between slashes."""


def mark_of(parent: int, leader: int) -> str:
    """Return the mark of the tree whose first process is `leader`, which `parent` started."""
    return f"/{parent}.{leader}/"


def die_with_parent(death_signal: int) -> None:
    """Have the kernel send `death_signal` to this process when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0):
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    """Ask the kernel to end this process with its parent, restore the signal handlers, and run the program."""
    parent, death_signal, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    die_with_parent(death_signal)
    if os.getppid() != parent:
        sys.exit(f"the parent {parent} is gone already")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ[TREES] = os.environ.get(TREES, "") + mark_of(parent, os.getpid())
    os.execvp(program[0], program)


if __name__ == "__main__":
    main()
