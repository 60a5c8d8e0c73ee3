"""The learner: parameters, optimizer, updates, checkpoints, hosts."""
