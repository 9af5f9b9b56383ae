"""What a GPU is asked in its first eight minutes; `benchmarks.gpu.__main__` says how."""
