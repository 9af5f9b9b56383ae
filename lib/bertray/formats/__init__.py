"""Files of any format become Arrow tables of the columns that are asked for; what the columns mean is known elsewhere.

    files      which files there are, their format and encoding; folders that are columns     delimited  CSV, TSV
    columnar   Parquet and Arrow, and names of classes that `datasets` keeps beside them      json_rows  JSON

Imports storage. No torch, no Ray.
"""
