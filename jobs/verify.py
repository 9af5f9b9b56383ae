"""`bertray verify`, from a checkout: python -m jobs.verify --help shows examples and every option."""

from bertray.__main__ import command

main = command("verify", __name__)
