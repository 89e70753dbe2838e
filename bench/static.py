"""`python -m dualdiff_engine.bench.static`: the command, see `bench.gpu.static`."""

from dualdiff_engine.bench.gpu.static import main

if __name__ == "__main__":
    main()
