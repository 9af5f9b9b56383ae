"""`bertray audit`, from a checkout: python -m jobs.audit --help shows examples and every option."""

from bertray.__main__ import command

main = command("audit", __name__)
