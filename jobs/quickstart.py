"""python -m jobs.quickstart: trains a small CNN on scikit-learn's digits with two Ray Train workers, then scores."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("quickstart")
