"""Convert the same small clips once for each fault, in forked processes that the fault ends.

``python -c "from support.convert_and_die import main; main()" MEDIA OUT COUNT point:nth[:kind] ...`` converts
MEDIA/clip_*.mp4 into OUT/<fault> and prints a line ``<fault> <exit status>`` each; ``after:SECONDS`` kills the
conversion from outside at that moment and uses OUT/after every time. Forking is safe here: nothing but imports has
happened before. Not run as a file, since every decode child would import that file, and with it torch.
"""

import os
import signal
import sys
import time
from pathlib import Path

import webdataset.writer  # noqa: F401  imported once here instead of seconds in every fork

from ca2st.durable import FaultPoints
from sharding.convert import convert
from support.shards import sample, small_config, source_list


def main() -> None:
    """Fork and convert for each fault in turn."""
    media, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    source = source_list([sample(media / f"clip_{number}.mp4", label=number % 2) for number in range(count)])
    for fault in sys.argv[4:]:
        point, _, seconds = fault.partition(":")
        timed = point == "after"
        child = os.fork()
        if child == 0:
            faults = FaultPoints() if timed else FaultPoints.parse(fault)
            convert(source, out / (point if timed else fault), small_config(), faults=faults)
            os._exit(0)
        if timed:
            time.sleep(float(seconds))
            os.kill(child, signal.SIGKILL)
        print(fault, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
