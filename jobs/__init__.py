"""What a person runs or submits: `python -m jobs.<job>` from the root of the project. Thin: parse, run, print."""
