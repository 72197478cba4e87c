"""What people and programs read of a run: console lines, TensorBoard and metrics, the plan's table,
plots. Functions over plain values.
"""
