"""Ray Train starts and restarts the workers; everything they know comes from the recipe and the run folder.

Ray keeps no checkpoint of ours: a restarted worker group resumes from the run folder, like a rerun by hand.

::

    driver          joins a cluster, checks it, trains on it, ends as what happened
    absolute        paths that mean the same in a worker
    demand          what is asked of the cluster against what its nodes have
    node_check      the same code, data and folder on every node, before anything starts
    supervision     the driver while the workers train: stops, failures that no restart mends
    worker_life     what a worker runs
    stopping        how a worker learns that it should stop
    launch_folder   how driver and workers talk: files in the run folder
    lost_workers    workers that died without a word, put on record
    trainer         Ray's trainer, set as a run asks for it
"""
