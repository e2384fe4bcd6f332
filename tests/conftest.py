"""Options and markers of the whole test set."""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", default=False, help="run tests marked slow too")


def pytest_configure(config):
    # Tests never reach for the network: a missing model must fail at once, not after retries.
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
