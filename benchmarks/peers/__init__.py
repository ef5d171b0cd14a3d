"""The programs that scoring is compared with: each module classifies a folder of JPEGs in another way, or does only a
part of the work.

Each follows its project's documentation and runs alone with `python -m`, in a process that `benchmarks/score.py` starts
and times. They import only `task` and `model`, so that they do not pay for what only our job needs; the exceptions are
`engine` and `decode`, which are the two parts of our job. All use the same model and batch size, in float32 unless
stated otherwise.
"""
