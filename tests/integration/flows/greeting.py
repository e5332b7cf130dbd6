"""A flow that is served with a schedule of a few seconds, in a process of its own."""

from __future__ import annotations

import sys

from prefect import flow


@flow
def greeting() -> str:
    return "good evening"


if __name__ == "__main__":
    greeting.serve(name=sys.argv[1], interval=3, limit=1)
