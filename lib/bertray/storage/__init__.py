"""Places and files: a path or URI, S3, what appears whole or not at all, the lock of an output, small record files.

    location   a path or URI: list, read, put in one step        s3, local     the two kinds of store under it
    outputs    where a job may write; sha256 of files            lock          one run at a time on an output
    records    small Parquet files of records

Imports the root alone. No torch, no Ray.
"""
