"""Commands: parse options, call the library, print. Heavy imports wait until a command runs."""
