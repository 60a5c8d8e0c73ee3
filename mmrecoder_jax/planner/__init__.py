"""What a stage will need, before it runs: its programs compiled for slices that are not here."""
