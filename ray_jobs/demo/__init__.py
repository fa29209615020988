"""The demo and the comparison of ways to join experts, on the synthetic world."""
