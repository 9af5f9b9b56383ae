"""`bertray report`, from a checkout: python -m jobs.report --help shows examples and every option."""

from bertray.__main__ import command

main = command("report", __name__)
