"""Strict readers of pickles and of `torch.save` files: data only, nothing is run."""
