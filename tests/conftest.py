"""Tests run offline, one thread a worker process (two without workers), and W&B never asks for anything."""

import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import signal

import torch
from transformers.utils import logging

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
logging.disable_progress_bar()
# A shell that starts the tests in the background ignores Ctrl-C for them, and some tests are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
