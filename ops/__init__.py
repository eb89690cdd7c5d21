"""The `duohuo` command: serving a center, running a whole mesh on one machine, and looking after it."""
