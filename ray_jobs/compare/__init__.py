"""``ca2st compare``: MLflow runs side by side, by what was set, what was reached, how it went and what it cost."""
