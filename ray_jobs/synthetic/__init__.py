"""The proof of learning on the synthetic world: experts, comparison, benches, demo."""
