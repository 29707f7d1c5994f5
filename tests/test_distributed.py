"""Two processes on the CPU, started by torchrun; the cases are in distributed_cases.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_cases import CASES

RANKS = 2

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without torch.distributed"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Case -> the traceback of each rank, empty where it held."""
    output = tmp_path_factory.mktemp("distributed") / "found"
    script = Path(__file__).with_name("distributed_cases.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    run = subprocess.run([*command, str(script), str(output)], capture_output=True, text=True, timeout=300)
    ranks = [Path(f"{output}.{rank}") for rank in range(RANKS)]
    assert all(path.exists() for path in ranks), f"{run.stdout}\n{run.stderr}"
    of_ranks = [json.loads(path.read_text(encoding="utf-8")) for path in ranks]
    return {name: [rank[name] for rank in of_ranks] for name in of_ranks[0]}


@pytest.mark.parametrize("case", CASES)
def test_two_processes(found, case):
    assert found[case] == [""] * RANKS, "\n".join(found[case])
