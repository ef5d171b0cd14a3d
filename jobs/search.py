"""python -m jobs.search [RECIPE] [--flags]: searches hyperparameters on Ray Tune; writes the winner as a bundle."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("search")
