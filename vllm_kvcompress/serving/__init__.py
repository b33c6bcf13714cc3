"""The command behind ``serve.py``: runs in the command line's process, before vLLM does."""
