"""Adapters: small trained weights beside a frozen model, put on with `attach` and taken off without a trace."""
