"""The nouns: what travels between stages, what is stored, and what people configure.

Nothing here opens a file, starts Ray or computes; every other package may import this one and this one
imports none of them.
"""
