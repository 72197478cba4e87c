"""Closed forms of what a run needs: parameters, memory, micro-batches, size of a checkpoint."""
