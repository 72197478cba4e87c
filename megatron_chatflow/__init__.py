"""Continual pre-training of language models on blends that move, on megatron-core.

Importing this package loads nothing else and changes nothing outside it: take what you need from
its parts (`megatron_chatflow.curriculum`, `megatron_chatflow.data`, ...).
"""

__version__ = "0.1.0"
