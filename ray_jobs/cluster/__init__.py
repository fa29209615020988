"""Ray: joining a cluster, examining its nodes, converting and training on them, submitting jobs.

Ray Train starts and restarts the workers; everything they know comes from the recipe and the run folder. Ray keeps no
checkpoint of ours: a restarted worker group resumes from the run folder, like a rerun by hand. The map is in the README
of this folder; beside it are examples that start a cluster.
"""
