"""Fast forms of computations, each beside the plain form that tests compare it with."""
