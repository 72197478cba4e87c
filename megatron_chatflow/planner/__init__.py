"""Closed forms of what a run needs: parameters, memory, batches, step time, checkpoints."""
