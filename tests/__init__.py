"""What Darkroom promises, one statement a test; the folders mirror demo/darkroom."""
