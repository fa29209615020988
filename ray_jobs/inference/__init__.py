"""A trained run used: evaluated, asked for predictions, its features written."""
