"""Exports: outputs in the layouts of other programs, and on the Hugging Face Hub."""
