"""``python -m coss_hf``: the command ``coss-hf``."""

from coss_hf.cli.main import main

if __name__ == "__main__":
    main()
