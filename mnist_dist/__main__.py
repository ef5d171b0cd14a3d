"""`python -m mnist_dist <job>`: the same as the command `mnist-dist`."""

from mnist_dist.commands import main

if __name__ == "__main__":
    main()
