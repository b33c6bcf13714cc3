"""Serve a model with a compressed KV cache: ``python serve.py [MODEL] [options]``."""

import sys

from vllm_kvcompress.serving.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
