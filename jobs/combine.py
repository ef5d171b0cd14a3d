"""python -m jobs.combine BUNDLE BUNDLE ... --output BUNDLE --method M: makes one bundle of several."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("combine")
