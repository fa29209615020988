"""The process that sends a run's journal on to MLflow: ``python -m ray_jobs.tracking.follower RUN_DIR PARENT_PID``.

Training never waits for it and does not notice when it is killed.
"""

import sys
from pathlib import Path

from ray_jobs.tracking.tracker import follow

if __name__ == "__main__":
    follow(Path(sys.argv[1]), parent_pid=int(sys.argv[2]))
