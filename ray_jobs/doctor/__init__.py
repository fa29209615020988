"""``ca2st doctor``: what works on this machine, tried rather than looked up, and how to fix what does not."""
