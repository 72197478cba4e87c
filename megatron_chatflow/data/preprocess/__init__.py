"""Text files to `.bin/.idx`."""
