"""What scoring is compared with: each module is a program that classifies a folder of JPEGs in another way, or does a
part of that alone.

Each is written as its project's documentation does it, and runs by itself as `python -m`, in a process that
`benchmarks/score.py` starts and times. None loads more of this package than `task` and `model`, so that none pays for
what only our job needs; but for `engine` and `decode`, which are the two parts of our job. All take the same model and
batch size, in float32 where nothing else is said.
"""
