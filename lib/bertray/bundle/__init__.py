"""A finished model: the saved folder, and what predicts with it.

    info         bundle.json, and the check of the files       card         the bundle's README.md
    bundle       texts -> predictions                          predictions  logits -> rows
    guard        the precision, and what it costs              openvino     the same model in another engine
    isolated     the bundle in a child process

Imports the rooms up to model. Needs torch, except `info`, `card`, `predictions`, `guard`, and the parent's side of
`isolated`; no Ray.
"""
