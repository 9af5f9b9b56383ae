"""`bertray predict`, from a checkout: python -m jobs.predict --help shows examples and every option."""

from bertray.__main__ import command

main = command("predict", __name__)
