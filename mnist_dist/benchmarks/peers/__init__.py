"""What scoring is compared with: each module is a program that classifies a folder of JPEGs in another way.

Each is written as its project's documentation does it, and runs by itself as `python -m`, in a process that
`benchmarks/score.py` starts and times. None loads more of this package than `task` and `model`, so that none pays for
what only our job needs. All take the same model file and batch size, in float32.
"""
