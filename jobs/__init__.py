"""The scripts that a user runs or submits: `python -m jobs.<job>` from the project root. They only call a command."""
