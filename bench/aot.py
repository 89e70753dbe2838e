"""`python -m dualdiff_engine.bench.aot`: the command, see `bench.gpu.aot`."""

from dualdiff_engine.bench.gpu.aot import main

if __name__ == "__main__":
    main()
