"""What people and programs read of a run: console lines, metrics, tables and plots.

Functions over plain values.
"""
