"""What people read: tables, printed by `terminal`, and pages, one HTML file for each output, made by `pages`.

    evaluation, bundle, audit, run, index    the facts of each kind of page, from files that jobs have written
    layout, templates/                       how they are written and drawn

Imports every room but drivers. No torch, no Ray.
"""
