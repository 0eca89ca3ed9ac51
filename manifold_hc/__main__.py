"""`python -m manifold_hc`: the command `mhc` without its script."""

from manifold_hc.cli import main

if __name__ == "__main__":
    main()
