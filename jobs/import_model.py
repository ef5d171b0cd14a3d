"""python -m jobs.import_model SOURCE --output BUNDLE: turns a model that was trained elsewhere into a bundle."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("import")
