"""`bertray demo`, from a checkout: python -m jobs.demo --help shows examples and every option."""

from bertray.__main__ import command

main = command("demo", __name__)
