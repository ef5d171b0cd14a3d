"""python -m jobs.evaluate --predictions URI | --bundle DIR --input URI: computes metrics of a table or a bundle."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("evaluate")
