"""The sub-commands of ``vidshard``, by what they are about.

A command imports its job when it runs: `vidshard --help` must not wait seconds for torch and Ray.
"""
