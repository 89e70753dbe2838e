"""`python -m dualdiff_engine.bench.gpu_suite`: the command, see `bench.gpu.suite`."""

from dualdiff_engine.bench.gpu.suite import main

if __name__ == "__main__":
    main()
