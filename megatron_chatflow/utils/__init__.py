"""Helpers without an idea of training: what every other package may import."""
