"""Commands, which parse options, call the library and print. Heavy imports are deferred until a command runs."""
