"""How good a model is: held-out loss, bits per byte, generation."""
