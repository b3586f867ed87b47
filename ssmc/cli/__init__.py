"""The command line, one command a file. Nothing here imports torch before a command runs."""
