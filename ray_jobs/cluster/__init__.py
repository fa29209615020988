"""Ray: joining a cluster, comparing its nodes, converting and training on them, submitting jobs.

Ray Train starts and restarts the workers; everything they know comes from the recipe and the run folder. Ray keeps no
checkpoint of ours: a restarted worker group resumes from the run folder, like a rerun by hand.

::

    ray_access      an address probed, a cluster joined, its token
    every_node      a function on every node
    node_check      the one examination of nodes: the doctor prints it, a training and a conversion refuse by it
    conversion      clips converted by the workers of a cluster
    driver          joins a cluster, compares what is asked with what it has, trains on it, ends as what happened
    supervision     the driver while the workers train: stops, workers that died, failures that no restart repairs
    worker_life     what a worker runs
    package         the package that a job carries
    submission      a training as a Ray job
    job_server      jobs sent and followed

Beside them: examples that start a cluster.
"""
