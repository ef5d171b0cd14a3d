"""Runs a job whose lock is taken over after two seconds of silence: `python -m tests.impatient jobs.train ...`."""

import runpy
import sys

from mnist_dist.store import lock

lock.SILENCE_S, lock.SECONDS_BETWEEN_BEATS, lock.SECONDS_BETWEEN_LOOKS = 2.0, 0.2, 0.1

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
