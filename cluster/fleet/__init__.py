"""The emulators of a node: an agent starts, watches, resets and lends them, and takes them with it when it ends."""
