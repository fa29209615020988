"""``ca2st shard inspect --html``: a shard set as one page: counts, classes, durations, clips to look at."""
