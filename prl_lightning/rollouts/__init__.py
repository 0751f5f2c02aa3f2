"""One iteration, from prompts to rollouts that are ready to train on."""
