"""The counterfactual generator: a conditional hierarchical VAE."""
