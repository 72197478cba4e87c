"""Scaling laws: tables of runs, fits with intervals, designs, allocation of compute.

scipy is imported inside functions, so that commands start fast.
"""
