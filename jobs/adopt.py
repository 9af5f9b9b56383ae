"""`bertray adopt`, from a checkout: python -m jobs.adopt --help shows examples and every option."""

from bertray.__main__ import command

main = command("adopt", __name__)
