# The commands in an image: `docker build -t mnist-dist .`, then
# `docker run --rm -v "$PWD:/data" mnist-dist score --bundle /data/bundle --input /data/photos --output /data/predictions`.
# For GPUs build with `--build-arg EXTRAS=[gpu]`. For a Ray cluster all nodes need the same image.
FROM python:3.11-slim-bookworm

ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /opt/mnist_dist
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY mnist_dist mnist_dist
COPY jobs jobs
RUN pip install --constraint constraints.txt ".${EXTRAS}" \
    && useradd --uid 1000 --create-home worker

USER 1000
WORKDIR /data
ENTRYPOINT ["mnist-dist"]
CMD ["--help"]
