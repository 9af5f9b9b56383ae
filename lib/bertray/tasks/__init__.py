"""Kinds of answers: all in which one differs from the others, but for its loss.

    single_label  each row has one label                  multi_label  a row has any number: where it differs
    regression    each row has a number                   task         the tasks by problem type

Imports formats, tokenization and metrics. No torch, no Ray; scikit-learn takes seconds, so it is imported where it is
called.
"""
