"""What a run says of itself while it goes: metrics and progress."""
