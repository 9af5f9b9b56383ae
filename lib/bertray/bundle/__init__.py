"""A finished model: the folder that is saved, and what predicts with it.

    info         bundle.json, and whether the files are its own    card      the README.md in it
    bundle       texts -> predictions                              predictions  logits -> rows
    guard        whether int8 or fp16 costs accuracy
    openvino     the same by another engine                        isolated  the same in a child process

Imports the rooms up to model. Needs torch, but for `info`, `card`, `predictions`, `guard`, and the parent's side of
`isolated`; no Ray.
"""
