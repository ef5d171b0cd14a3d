"""Turns a named data set, a folder, a bucket prefix or a Parquet file into uint8 pixels, decoded once and split.

`sources` lists the images, `images` decodes them, `records` stores the result, `splits` divides it and `batches` orders
it. So that a decode task starts quickly, nothing here imports Ray, and only Keras' download of a data set TensorFlow.
"""
