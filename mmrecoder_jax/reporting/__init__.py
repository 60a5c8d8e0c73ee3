"""What a run leaves to look at: tables, curves, trajectories, one HTML page."""
