"""python -m jobs.train [RECIPE] [--flags]: fine-tunes a classifier on Ray Train and writes it as a bundle."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("train")
