"""What people read: tables in the terminal.

Imports every room but drivers. No torch, no Ray.
"""
