"""Places and files: local paths and S3, atomic writes, the lock of an output, small Parquet files of records.

    location   a path or URI: list, read, write atomically       s3            requests to S3 that fail for a while
    local      files on this machine's disks                     explanations  what storage answered, as a sentence
    outputs    the bundle guard, sha256, files of records        lock          one run at a time on an output
    patience   how long to wait for storage, and for a process

Imports the root alone. No torch, no Ray.
"""
