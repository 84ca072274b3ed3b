"""Armo beside the real programs, which `make programs` installs; skipped where they are not.

A package, because its files are called as those of `tests/serve`, which need no program.
"""
