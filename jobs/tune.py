"""`bertray tune`, from a checkout: python -m jobs.tune --help shows examples and every option."""

from bertray.__main__ import command

main = command("tune", __name__)
