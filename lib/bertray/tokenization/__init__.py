"""From a column of texts to token ids, and from these to batches.

    columns    a column as files hold it -> valid strings      ids        texts -> token ids
    windows    a long text -> overlapping windows              tokenizer  a column of texts -> token ids
    batching   token ids -> batches, packed or padded

Imports only the root. No torch, no Ray.
"""
