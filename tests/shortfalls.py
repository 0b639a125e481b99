"""What the tests of the CUDA engine found and what is not mended yet: what falls short, and the tests that say so."""

SHORTFALLS = {
    "one spatial element: a table is looked up for each, and shared memory, not the bus, is the limit": (
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[64,256,1,G=32-float16]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[64,256,1,G=32-float32]",
        "tests/test_cuda_traffic.py::test_shared_memory_keeps_up[64,256,1,G=32-float64]",
    ),
}
