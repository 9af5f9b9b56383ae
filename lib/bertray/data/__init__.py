"""Labelled files become a data set: train, validation and test rows, whose labels are numbered.

    readers    files of any format -> one table           cleaning   which rows stay, and why
    splits     rows held out                              prepare    all of it, for bertray prepare
    dataset    the folder that results, opened            config     the options of bertray prepare
    synthetic  the demo's corpus                          resume_words  what that is made of

Imports storage, tokenization and metrics. No torch, no Ray.
"""
