"""A package in place of the project's in the child processes of tests/cli/test_sweep.py."""
