"""Convert the same small clips once for each fault, in forked processes that the fault ends.

``python -c "from support.convert_and_die import main; main()" MEDIA OUT COUNT point:nth[:kind] ...`` converts
MEDIA/clip_*.mp4 into OUT/<fault> and prints a line ``<fault> <exit status>`` each; ``sample:N`` kills the
conversion after N samples and uses OUT/sample every time. WORKERS in the environment is the number of processes
that make shards. Forking is safe here: nothing but imports has happened before. Not run as a file, since every decode
child would import that file, and with it torch.
"""

import os
import sys
from functools import partial
from pathlib import Path

import webdataset.writer  # noqa: F401  imported once here instead of seconds in every fork

from ca2st.durable import FaultPoints
from sharding.conversion import convert
from sharding.shard_task import LocalWorkers
from support.shards import sample, small_config, source_list


def main() -> None:
    """Fork and convert for each fault in turn."""
    media, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    source = source_list([sample(media / f"clip_{number}.mp4", label=number % 2) for number in range(count)])
    workers = int(os.environ.get("WORKERS", "1"))
    for fault in sys.argv[4:]:
        folder = "sample" if fault.startswith("sample:") else fault
        child = os.fork()
        if child == 0:
            config, processes = small_config(workers=workers), partial(LocalWorkers, children_per_process=1)
            convert(source, out / folder, config, faults=FaultPoints.parse(fault), pool=processes)
            os._exit(0)
        print(fault, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
