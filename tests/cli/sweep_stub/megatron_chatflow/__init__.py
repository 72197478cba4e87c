"""A package that stands in for the project's in the child processes of tests/cli/test_sweep.py."""
