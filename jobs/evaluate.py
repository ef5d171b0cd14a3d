"""python -m jobs.evaluate --predictions URI | --bundle DIR --input URI: says what a table, or a bundle, is worth."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("evaluate")
