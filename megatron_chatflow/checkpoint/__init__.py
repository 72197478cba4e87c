"""Run directories and the checkpoints in them: writing, verifying, loading, averaging."""
