"""Trained models tested: predictions, metrics by protocol, submissions, significance and robustness."""
