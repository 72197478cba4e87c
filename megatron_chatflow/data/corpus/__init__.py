"""Megatron's `.bin/.idx`: reading, writing, merging and verifying."""
