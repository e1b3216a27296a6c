"""Atomic writes of files and directories, bounded reads of small files, and the free memory from Linux's files."""
