"""Hugging Face folders to run directories and back. Importing this package imports neither torch
nor megatron.
"""
