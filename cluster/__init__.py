"""Config, command line, starting Ray and placing actors, the controller loop, supervision and resume."""
