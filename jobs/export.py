"""python -m jobs.export --bundle DIR --format F: converts a bundle's model for another runtime and compares the two."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("export")
