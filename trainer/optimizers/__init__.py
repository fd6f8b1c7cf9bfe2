"""One update of this rank's fragments: the rules, their kernels, norms and rounding."""
