"""Every test runs on two threads, offline, with W&B writing nowhere unless the test says so."""

import os

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers.utils import logging

torch.set_num_threads(min(2, os.cpu_count() or 1))
logging.disable_progress_bar()
