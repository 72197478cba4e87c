"""FP8: the recipes, and what they mean on a machine without Transformer Engine."""
