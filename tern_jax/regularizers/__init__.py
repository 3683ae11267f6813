"""WDR, the weight discretization regularizer of SCA."""
