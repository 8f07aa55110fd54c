"""Training: one resumable loop, the losses of the usual denoisers, and the shapes world as training data."""
