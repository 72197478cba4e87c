"""The run: inputs, optimizer, steps, checkpoints, the loop. `inputs` and `ledger` need no torch."""
