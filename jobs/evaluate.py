"""`bertray evaluate`, from a checkout: python -m jobs.evaluate --help shows examples and every option."""

from bertray.__main__ import command

main = command("evaluate", __name__)
