"""What runs in the zygote: a warm interpreter that forks a child for every script."""
