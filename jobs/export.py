"""python -m jobs.export --bundle DIR --format F: a bundle's model for another runtime, run there and compared."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("export")
