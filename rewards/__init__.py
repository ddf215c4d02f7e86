"""What is good: probes with a verifiable truth, the verifier, reward models and their composition. Knows no trainer."""
