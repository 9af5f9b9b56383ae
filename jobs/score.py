"""`bertray score`, from a checkout: python -m jobs.score --help shows examples and every option."""

from bertray.__main__ import command

main = command("score", __name__)
