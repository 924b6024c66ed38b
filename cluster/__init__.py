"""Config, command line, Ray start-up and placement, the controller loop, supervision and resume."""
