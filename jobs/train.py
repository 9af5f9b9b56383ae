"""`bertray train`, from a checkout: python -m jobs.train --help shows examples and every option."""

from bertray.__main__ import command

main = command("train", __name__)
