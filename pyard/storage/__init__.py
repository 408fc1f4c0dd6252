"""What lies on disk: files that appear whole, checkpoints of a run, logs. Knows nothing of what it keeps."""
