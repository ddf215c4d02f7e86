"""How a model is changed: standard mix and dose, warm start, policy optimisation, ledger."""
