"""``ca2st doctor``: what works on this machine, tried rather than looked up, and the mend of what does not."""
