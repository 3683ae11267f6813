"""What everything else is built on: containers, the contract, paths, checks."""
