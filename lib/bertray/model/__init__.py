"""An encoder on a device, run over batches of token ids.

    sources      where encoders come from                 pretrained loaded and checked, with a new head
    runtime      device, precision, memory and thread of a process
    attention    attention without padding                buckets    attention in training on CPUs
    adapter      how a batch is laid out for a model      head       the layer that gives the logits
    encoder      tokens -> logits                         onednn     linear layers for bf16 on CPUs
    openvino_export  a model written for OpenVINO

Imports the rooms up to tokenization. Needs torch, but for `sources`; no Ray.
"""
