"""What a run needs on a cluster, in closed forms: parameters, memory, micro-batches, checkpoints.
Imports neither torch nor megatron.
"""
