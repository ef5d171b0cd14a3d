"""python -m jobs.report [--storage URI]: writes one page about everything in a storage, with links to all reports."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("report")
