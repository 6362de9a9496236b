"""Memory does not grow with the number of rows, and a folder of many files is listed by its entries."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Begins a run of so many rows, finishes it in this process, sums it up; prints its peak memory in MB.
WHOLE_RUN = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from standins import quick, run_of
from paligemma.batch.status import write_summary
from paligemma.batch.worker import finish_shards
folder = run_of(Path(sys.argv[2]), int(sys.argv[3]), shard_size=256)
finish_shards(folder, range(folder.num_shards), lambda: quick(folder.settings), lambda: False, lambda line: None)
summary = write_summary(folder, 1.0, folder.num_rows, 0)
assert summary["answered"] == int(sys.argv[3]) and summary["complete"]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

# Lists a folder, writes the list, checks its ids; prints the number of rows, the seconds of CPU and the peak memory.
LISTING = """
import resource, sys, time
from pathlib import Path
from paligemma.batch.folder import check_ids, write_rows
from paligemma.batch.inputs import list_inputs
path = Path(sys.argv[2])
with open(path, "wb") as file:
    count = write_rows(file, list_inputs([sys.argv[1]], "caption en"))
check_ids(path)
print(count, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def printed(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return [float(word) for word in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


def peak_of_a_run(folder, count):
    return printed(WHOLE_RUN, HERE, folder, count)[0]


@pytest.mark.slow
def test_twenty_thousand_rows_take_no_more_memory_than_a_thousand(tmp_path):
    """Within 50 MB. (A million rows: measured once, see docs/batch.md.)"""
    few, many = (peak_of_a_run(tmp_path / str(count), count) for count in (1_000, 20_000))
    assert many - few < 50


@pytest.mark.slow
def test_a_folder_of_many_files_is_listed(tmp_path):
    for name in range(20):
        (tmp_path / "photos" / str(name)).mkdir(parents=True)
        for number in range(500):
            (tmp_path / "photos" / str(name) / f"{number}.jpg").touch()
    count, _, _ = printed(LISTING, tmp_path / "photos", tmp_path / "rows.jsonl")
    assert count == 10_000
