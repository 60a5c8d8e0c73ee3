"""Rollouts, rewards, advantages and the GRPO loss."""
