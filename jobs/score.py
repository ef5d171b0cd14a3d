"""python -m jobs.score --bundle DIR --input URI [URI ...] --output URI: scores images into a Parquet table."""

from mnist_dist.commands import run_job

if __name__ == "__main__":
    run_job("score")
