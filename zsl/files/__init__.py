"""Atomic writes of files and directories, and bounded reads of small files."""
