"""Attempts to break the package, with counts: `make reliability` runs them all and prints one table.

Each module is one way of trying, and has `figures()`, which tries it in full; the tests beside this folder run a short form of
each. Whatever is found goes into a test of its own.
"""
