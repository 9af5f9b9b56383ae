"""An encoder on a device, run over batches of token ids.

    sources      where encoders come from                 files        checks of a model's files
    outputs      what a finished classifier gives        pretrained   a model loaded and checked, with a head
    runtime      device, precision, memory, thread        adapter      batch layout, precision and last layer
    attention    attention without padding                buckets      attention in training on CPUs
    encoder      tokens -> logits

Imports the rooms up to tokenization. Needs torch, except `sources`, `files` and `outputs`; no Ray.
"""
