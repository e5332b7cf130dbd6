"""The process that tells one tracker of a run: ``python -m disagg_core.tracking.main <request.json>``.

It works until its standard input ends, which it does when the run's process closes it or is killed, then tells what is
left, and is gone a bounded time later, whatever its tracker does.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

from disagg_core.tracking.feed import Feed
from disagg_core.tracking.mlflow_models import IMPATIENT
from disagg_core.tracking.trackers import TrackerRequest, make_observer

_MARGIN_S = 2.0


def main(request_file: Path) -> None:
    """Tell the tracker that the request names."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)  # the run's process gets them too, and ends this one by its standard input
    request = TrackerRequest.model_validate_json(request_file.read_bytes())
    os.environ.update({name: value for name, value in IMPATIENT.items() if name not in os.environ})
    with request.state.with_suffix(".lock").open("wb") as lock:
        ending = threading.Thread(target=_end_in_time, args=(request.last_s,), name="tracker-end", daemon=True)
        ending.start()
        fcntl.flock(lock, fcntl.LOCK_EX)  # that of an earlier process of the run may be at its last lines
        feed = Feed(
            request.run,
            lambda: make_observer(request.tracker, request.section),
            events=request.events,
            state=request.state,
        )
        feed.follow(_ended, last_s=request.last_s)


def _ended(wait_s: float) -> bool:
    """Wait for the end of standard input, at most `wait_s` seconds; tell whether it has come. Nothing else comes."""
    return bool(select.select([sys.stdin], [], [], wait_s)[0])


def _end_in_time(last_s: float) -> None:
    """Once standard input has ended, end this process if it does not do so itself: clients hang while they exit."""
    select.select([sys.stdin], [], [])
    time.sleep(last_s + _MARGIN_S)
    os._exit(1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    main(Path(sys.argv[1]))
