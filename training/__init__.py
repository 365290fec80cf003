"""How the embedded models were made: artwork, captions, the three networks, the folder, the measurements."""
