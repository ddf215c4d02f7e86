"""Ground floor: the embedded base model, loading, and the prompt-sharing forward and rollouts. Knows no trait."""
