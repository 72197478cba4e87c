"""What a rank of tests/chaos.py needs, imported once in the process that the ranks are forked from."""

import importlib
import os

os.environ["OMP_NUM_THREADS"] = "1"
importlib.import_module("torch").set_num_threads(1)
importlib.import_module("megatron_chatflow.engine.cpu").install()
for name in ("commands.train", "training.inputs", "training.checkpoint", "training.loop", "training.rates"):
    importlib.import_module(f"megatron_chatflow.{name}")
importlib.import_module("tests.audit")
