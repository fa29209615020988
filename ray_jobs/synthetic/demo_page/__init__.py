"""The demo as one HTML page: who could know what, who learned it, and the clips themselves."""
