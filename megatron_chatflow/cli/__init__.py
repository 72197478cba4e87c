"""One file per command: ``parser()`` and ``main(argv) -> exit code``."""
