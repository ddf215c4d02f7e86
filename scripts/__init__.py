"""The verbs: the command line, the experiment (arms x seeds x stages), plan and doctor."""
