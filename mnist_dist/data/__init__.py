"""From a name, a folder, an `s3://` prefix or a Parquet file to uint8 pixels, decoded once and split.

`sources` lists, `images` decodes, `records` keeps what was decoded, `splits` divides it, `batches` orders it. Nothing
here imports Ray, and TensorFlow only when Keras has to download a data set, so that a decode task starts at once.
"""
