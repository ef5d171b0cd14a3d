#!/usr/bin/env bash
# VGG16 and ResNet50 at 224 px in bfloat16 on one GPU: forward pass (batch 256) and training step (batch 128) of this
# project on JAX, beside torch.compile, and how fast the cores decode for them. At most four minutes; tables on stderr,
# one line of JSON on stdout. Needs Python 3.11 or newer with JAX, Keras, h5py, pyarrow, Pillow, OpenCV, simplejpeg,
# scikit-image and scikit-learn, and for the comparison PyTorch and timm. Does not need Ray, TensorFlow, tyro, msgspec, a
# store's client or OpenVINO.
set -euo pipefail
cd "$(dirname "$0")/.."
export KERAS_BACKEND=jax
exec "${PYTHON:-python3}" -m benchmarks.gpu
