"""The contract of each network: what goes in, what comes out, in which shapes."""
