"""Places in buckets of Google Cloud Storage: requests, and folders that stand for them."""
