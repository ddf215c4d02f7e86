"""What has changed: capability, generalisation, statistics, results and report. Sees no reward model."""
