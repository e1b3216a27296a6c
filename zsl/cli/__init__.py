"""The commands: parse, print, call; nothing else. Heavy imports wait until a command really runs."""
