"""Tests run offline and on one thread each. W&B is off but for the tests of it, which ask for `tracking=offline`."""

import os

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import atexit
import shutil
import signal
import tempfile

import pytest
import torch
from transformers.utils import logging

from specbench import fast

# What checks of targets remember stays with the tests that asked.
if "SPECBENCH_CACHE" not in os.environ:
    os.environ["SPECBENCH_CACHE"] = tempfile.mkdtemp(prefix="specbench-checks-")
    atexit.register(shutil.rmtree, os.environ["SPECBENCH_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
logging.disable_progress_bar()
# A shell that starts the tests in the background ignores Ctrl-C for them, and some tests are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain", action="store_true", help="run every test with specbench.fast switched off")


@pytest.fixture(autouse=True)
def switch(request: pytest.FixtureRequest):
    """Fast computations, or plain ones throughout with --plain; a test that switches does so for itself alone."""
    fast.enable(not request.config.getoption("--plain"))
    yield
    fast.enable()


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only wait for each other on two, forked processes must not inherit a pool of threads, and a
    test that asks for more does not ask for the next one."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
