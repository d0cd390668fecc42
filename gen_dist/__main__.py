"""`python -m gen_dist` is `gen-dist`."""

from gen_dist.commands import main

if __name__ == "__main__":
    main()
