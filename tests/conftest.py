"""Options of the test suite."""


def pytest_addoption(parser):
    parser.addoption(
        "--networks",
        type=int,
        default=200,
        help="how many random networks test_random_networks.py draws (default: 200)",
    )
