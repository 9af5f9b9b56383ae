"""A column of texts becomes token ids, and these become batches.

    columns    text as it stands in files -> valid strings
    ids        texts -> token ids                         windows    a long text in overlapping windows
    tokenizer  a column of texts -> token ids             batching   token ids -> batches, packed or padded
    ragged     pieces of unequal length end to end in one array, which all of these are

Imports the root alone. No torch, no Ray.
"""
