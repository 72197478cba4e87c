"""Devices and processes.

Importing this package changes nothing; a command that runs a model calls
`process_groups.install_engine`.
"""
