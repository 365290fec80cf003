"""Scripts that run in the peers' environments, without Darkroom: one a peer, all of them speaking `protocol`."""
