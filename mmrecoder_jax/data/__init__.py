"""Charts, dialogues and the grain pipelines that turn them into learner batches."""
