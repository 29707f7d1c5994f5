"""Which tests are slow: by how long they took when that was last recorded.

    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) pytest -m "slow or not slow" --record-durations

writes tests/durations.json. A test that took long is marked slow, except the shortest of those that are
parameters of one function: so the short run has a bit of everything. It also has what is marked short,
because nothing else runs what that runs.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("durations.json")
# seconds: what is recorded, what is long, and what is too long for any of a function to be in the short run
RECORDED, LONG, TOO_LONG = 0.5, 0.6, 2.0


def mark_slow(items, durations):
    """Mark what is slow of the collected tests."""
    of_functions = defaultdict(list)
    for item in items:
        of_functions[item.nodeid.partition("[")[0]].append((durations.get(item.nodeid, 0.0), item))
    for tests in of_functions.values():
        shortest = min(seconds for seconds, _ in tests)
        spared = shortest if shortest < TOO_LONG else 0.0
        for seconds, item in tests:
            if seconds >= LONG and seconds != spared and not item.get_closest_marker("short"):
                item.add_marker(pytest.mark.slow)


class Recorder:
    """Adds up what the phases of each test take."""

    def __init__(self):
        self._seconds = defaultdict(float)

    def pytest_runtest_logreport(self, report):
        self._seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self):
        before = json.loads(FILE.read_text(encoding="utf-8"))
        # the longest that was seen: machines differ
        now = {name: max(round(s, 1), before.get(name, 0.0)) for name, s in self._seconds.items()}
        kept = {name: seconds for name, seconds in sorted({**before, **now}.items()) if seconds >= RECORDED}
        FILE.write_text(json.dumps(kept, indent=0) + "\n", encoding="utf-8")
