"""Files of prompts: their rows, the journal of a run, and its gallery."""
