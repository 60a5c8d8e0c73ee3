"""The model reward: a judge compares the render with the target."""
