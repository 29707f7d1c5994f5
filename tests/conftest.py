"""Options of the test suite."""

import os

import torch


def pytest_addoption(parser):
    parser.addoption(
        "--networks",
        type=int,
        default=200,
        help="how many random networks test_random_networks.py draws (default: 200)",
    )


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the processes share the cores
