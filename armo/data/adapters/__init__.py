"""Adapters: rows of published sets made native, one function per set."""
