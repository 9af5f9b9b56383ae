"""`bertray prepare`, from a checkout: python -m jobs.prepare --help shows examples and every option."""

from bertray.__main__ import command

main = command("prepare", __name__)
