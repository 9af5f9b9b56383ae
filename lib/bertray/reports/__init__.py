"""Tables for people, printed by `terminal`.

Imports every room but drivers. No torch, no Ray.
"""
