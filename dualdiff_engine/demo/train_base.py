"""`python -m dualdiff_engine.demo.train_base`: earlier name of `demo.train.base`."""

from dualdiff_engine.demo.train.base import main

if __name__ == "__main__":
    main()
