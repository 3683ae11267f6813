"""One run: a float net, a ternary net, its packed file, and the record."""
