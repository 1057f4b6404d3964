"""One decode step of a whole layer: its arrays, its programs, and the parts of their time."""
