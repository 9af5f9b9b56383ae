"""Labelled files become a data set: train, validation and test rows with numbered labels.

    readers    files of any format -> one table           labels     one label, however it is spelt
    cleaning   which rows stay, and why
    splits     rows held out                              prepare    all steps, for bertray prepare
    dataset    a prepared data set, opened                config     the options of bertray prepare
    synthetic  the demo's corpus

Imports storage, formats, tokenization, metrics and tasks. No torch, no Ray.
"""
