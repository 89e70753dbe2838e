"""`python -m dualdiff_engine.demo.train_adapters`: earlier name of `demo.train.adapters`."""

from dualdiff_engine.demo.train.adapters import main

if __name__ == "__main__":
    main()
