"""python -m jobs.doctor [--storage URI] [--json]: finds problems on every node that would break a job."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("doctor")
