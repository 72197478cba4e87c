"""What a rank of tests/chaos.py needs, imported once in the process that the ranks are forked
from.
"""

import importlib
import os

os.environ["OMP_NUM_THREADS"] = "1"
importlib.import_module("torch").set_num_threads(1)
importlib.import_module("megatron_chatflow.distributed.cuda_shim").install()
for name in (
    "cli.train",
    "training.data_setup",
    "checkpoint.state_dict",
    "training.trainer",
    "training.train_loop",
    "training.lr_check",
):
    importlib.import_module(f"megatron_chatflow.{name}")
importlib.import_module("tests.audit")
