"""Conversion between Hugging Face folders and run directories.

Importing this package imports neither torch nor megatron.
"""
