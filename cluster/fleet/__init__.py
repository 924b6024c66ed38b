"""The emulators of a node: an agent starts, watches, resets and lends them, and stops them when it ends."""
