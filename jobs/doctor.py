"""python -m jobs.doctor [--storage URI] [--json]: says what would break a job, on every node, and what to do."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("doctor")
