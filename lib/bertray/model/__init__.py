"""An encoder on a device, run over batches of token ids.

    sources      where encoders come from                 files        what stands in an encoder's folder
    pretrained   an encoder loaded and checked, with a head for the labels
    runtime      device, precision, memory, thread        adapter      batch layout, precision and last layer
    attention    attention without padding                buckets      attention in training on CPUs
    encoder      tokens -> logits

Imports the rooms up to tokenization. Needs torch, except `sources` and `files`; no Ray.
"""
