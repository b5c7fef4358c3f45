"""The command line, `python -m cosmos3_fast`: one file per command."""
